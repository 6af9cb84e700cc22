"""Finding stop strings in a text that arrives byte by byte. Knows bytes, not tokens.

An Aho-Corasick automaton: one dictionary look-up a byte, however many stop strings there are. Its node says how many of
the bytes read so far might still become part of a stop string, so nothing else need be held back.

Which match wins: the one that **ends first**, because it is decided as soon as its last byte is known and therefore
does not depend on how the text was cut into tokens; among stop strings that end at the same byte the **longest**,
because anything less would let bytes of a stop string through.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Node:
    """A prefix of at least one stop string."""

    depth: int = 0  # its length
    children: dict[int, _Node] = field(default_factory=dict)  # by next byte
    fallback: _Node | None = None  # the longest proper suffix that is a prefix too; None at the root
    match: bytes | None = None  # the longest stop string that ends here


class StopMatcher:
    """Reads a text and says where the first stop string ends in it."""

    def __init__(self, stop_strings: Iterable[bytes]) -> None:
        self._root = _build_automaton(stop_strings)
        self._node = self._root

    @property
    def num_undecided_bytes(self) -> int:
        """How many of the last bytes read are the beginning of a stop string."""
        return self._node.depth

    def push(self, data: bytes) -> tuple[bytes, int] | None:
        """Read `data`. Returns the stop string that is complete now and how many bytes of `data` came after it.

        Once a stop string was found the matcher has nothing more to say, and must not be used again.
        """
        for num_read, byte in enumerate(data, start=1):
            self._node = self._next(self._node, byte)
            if self._node.match is not None:
                return self._node.match, len(data) - num_read
        return None

    @staticmethod
    def _next(node: _Node, byte: int) -> _Node:
        while (child := node.children.get(byte)) is None:
            if node.fallback is None:
                return node
            node = node.fallback
        return child


def _build_automaton(stop_strings: Iterable[bytes]) -> _Node:
    root = _Node()
    for stop_string in stop_strings:
        node = root
        for byte in stop_string:
            node = node.children.setdefault(byte, _Node(depth=node.depth + 1))
        node.match = stop_string
    _link_fallbacks(root)
    return root


def _link_fallbacks(root: _Node) -> None:
    """Link every node to its longest suffix, shortest nodes first; a node without a match takes its suffix's."""
    queue = deque([root])
    while queue:
        node = queue.popleft()
        for byte, child in node.children.items():
            child.fallback = root if node.fallback is None else StopMatcher._next(node.fallback, byte)
            child.match = child.match or child.fallback.match
            queue.append(child)
