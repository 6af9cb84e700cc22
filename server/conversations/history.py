"""The history of a log: the path from one of its entries to the empty history.

A log only grows, and its entries name their parents; what was said in a conversation is what lies on the path from its
head. Knows entries; no store, no engine, no text.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from engine.messages import CheckpointRef, InitialStateRef
from engine.token_chain import root_digest
from server.conversations.ledger import Answer, Item, LedgerCorrupt, Turn


def is_marker(turn: Turn) -> bool:
    """Say whether the entry consumed nothing: it only moves the head, or adds items that are rendered later."""
    return not turn.prompt_ids and not turn.output_ids


def path_to(entries: Sequence[Turn], version: int, base: int = 0) -> list[Turn] | None:
    """Return the entries after `base` on the path to `version`, oldest first; None if it does not lead over `base`.

    `entries` are all entries of a log after `base`, in order.
    """
    path, begin = tail_to(entries, version, base)
    return path if begin == base else None


def tail_to(entries: Sequence[Turn], version: int, base: int) -> tuple[list[Turn], int]:
    """As `path_to`, with the entry that those continue: `base` or, where the path does not lead over that, one before.

    0 is the empty history.
    """
    path: list[Turn] = []
    while version > base:
        entry = entries[version - base - 1]
        path.append(entry)
        version = entry.parent_version
    return path[::-1], version


@dataclass(frozen=True, slots=True)
class History:
    """A whole path, oldest entry first."""

    root: bytes  # the chain of the empty history
    path: tuple[Turn, ...] = ()

    @property
    def version(self) -> int:
        """The entry it leads to; 0 is the empty history."""
        return self.path[-1].version if self.path else 0

    @property
    def chain(self) -> bytes:
        """The chain of its tokens."""
        return self.path[-1].chain if self.path else self.root

    @property
    def num_tokens(self) -> int:
        """How many tokens it has."""
        return self.path[-1].num_tokens if self.path else 0

    @property
    def preamble(self) -> str:
        """The system text it begins with."""
        return self.path[-1].preamble if self.path else ""

    @property
    def items(self) -> list[Item]:
        """Everything that was said, in order."""
        return [item for entry in self.path for item in entry.items]

    @property
    def pending(self) -> list[Item]:
        """The last items, which no turn has rendered yet."""
        trailing: list[Turn] = []
        for entry in reversed(self.path):
            if not is_marker(entry):
                break
            trailing.append(entry)
        return [item for entry in reversed(trailing) for item in entry.items]

    @property
    def answers(self) -> dict[str, Answer]:
        """The tokens of every answer among the items, by its id."""
        carried = {answer.answer_id: answer for entry in self.path for answer in entry.answers}
        return carried | {
            entry.request_id: Answer(
                answer_id=entry.request_id, output_ids=entry.output_ids, opening=entry.opening, hint=entry.hint
            )
            for entry in self.path
            if not is_marker(entry)
        }

    def token_ids(self, after_version: int = 0) -> list[int]:
        """Return the tokens of the entries after `after_version`, which lies on the path."""
        return [
            token_id
            for entry in self.path
            if entry.version > after_version
            for token_id in (*entry.prompt_ids, *entry.output_ids)
        ]

    def newest(self, checkpoints: Mapping[int, CheckpointRef]) -> tuple[int, CheckpointRef] | None:
        """Return the last entry of the path that has a checkpoint, and the checkpoint."""
        known = [entry.version for entry in self.path if entry.version in checkpoints]
        return (known[-1], checkpoints[known[-1]]) if known else None

    def until(self, version: int) -> History | None:
        """Return the part that leads to `version`, if that lies on the path."""
        if version == 0:
            return replace(self, path=())
        versions = [entry.version for entry in self.path]
        return replace(self, path=self.path[: versions.index(version) + 1]) if version in versions else None

    def straightened(self) -> list[Turn]:
        """Return the path as the entries of a log of its own, versions 1, 2, 3, ..., with the same chains."""
        return [
            msgspec.structs.replace(entry, version=number, parent_version=number - 1)
            for number, entry in enumerate(self.path, start=1)
        ]


def scoped(tenant: str, name: str) -> str:
    """Return the id under which the ledger keeps what `tenant` calls `name`: nobody else's names lead there."""
    return f"{tenant}/{name}" if tenant else name


def name_of(conversation_id: str) -> str:
    """Return what its tenant calls a log."""
    return conversation_id.rpartition("/")[2]


def tenant_of(conversation_id: str) -> str:
    """Return whose log it is."""
    return conversation_id.rpartition("/")[0]


def root_of(conversation_id: str, initial_state: InitialStateRef | None = None) -> bytes:
    """Return the chain of the log's empty history, which begins from the zero state or from a tuned one."""
    return root_digest(tenant_of(conversation_id), "" if initial_state is None else initial_state.fingerprint)


def history_of(
    conversation_id: str, entries: Sequence[Turn], version: int, initial_state: InitialStateRef | None = None
) -> History:
    """Return the history that leads to `version`, from all entries of a log; raises `LedgerCorrupt`."""
    path = path_to(entries, version)
    if path is None:
        raise LedgerCorrupt("the path of a log does not lead to its beginning")
    return History(root_of(conversation_id, initial_state), tuple(path))


def superseded(versions: Collection[int], limit: int) -> list[int]:
    """Return which checkpoints to let go, so that at most `limit` stay: newest first, older ones ever further apart.

    Of the versions whose distance to the newest has the same number of binary digits the farthest stays, as it will be
    the nearest of its kind soon; the newest always stays.
    """
    newest = max(versions)
    by_digits: dict[int, int] = {}
    for version in sorted(versions, reverse=True):
        by_digits[(newest - version).bit_length()] = version
    kept = sorted(by_digits.values(), reverse=True)[:limit]
    return sorted(set(versions) - set(kept))
