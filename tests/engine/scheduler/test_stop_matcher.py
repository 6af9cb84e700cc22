from hypothesis import given
from hypothesis import strategies as st

from engine.scheduler.stop_matcher import StopMatcher

TEXTS = st.text(alphabet="ab", max_size=40).map(str.encode)
STOP_STRINGS = st.lists(st.text(alphabet="ab", min_size=1, max_size=6).map(str.encode), max_size=4)


def first_match(text: bytes, stop_strings: list[bytes]) -> tuple[bytes, int] | None:
    """Return, naively, the longest of the stop strings that end first in `text`, and where it ends."""
    for end in range(1, len(text) + 1):
        ending = [stop_string for stop_string in stop_strings if text[:end].endswith(stop_string)]
        if ending:
            return max(ending, key=len), end
    return None


def undecided(text: bytes, stop_strings: list[bytes]) -> int:
    """Return, naively, the length of the longest end of `text` that some stop string begins with."""
    lengths = range(len(text), -1, -1)
    return next(n for n in lengths if any(s.startswith(text[len(text) - n :]) for s in [*stop_strings, b""]))


@given(TEXTS, STOP_STRINGS)
def test_finds_what_a_naive_search_finds(text: bytes, stop_strings: list[bytes]) -> None:
    """The match is the longest stop string among those that end first, and the rest of the data is counted."""
    expected = first_match(text, stop_strings)
    match = StopMatcher(stop_strings).push(text)
    assert match == (expected and (expected[0], len(text) - expected[1]))


@given(TEXTS, STOP_STRINGS, st.data())
def test_the_cut_of_the_text_makes_no_difference(text: bytes, stop_strings: list[bytes], data: st.DataObject) -> None:
    """Pushing a text in pieces finds the same match, in the piece in which it ends."""
    expected = first_match(text, stop_strings)
    matcher = StopMatcher(stop_strings)
    position = 0
    while position < len(text):
        size = data.draw(st.integers(1, len(text) - position))
        match = matcher.push(text[position : position + size])
        position += size
        if match is not None:
            assert (match[0], position - match[1]) == expected
            return
    assert expected is None


@given(TEXTS, STOP_STRINGS)
def test_counts_the_bytes_that_may_become_a_stop_string(text: bytes, stop_strings: list[bytes]) -> None:
    """The undecided bytes are the longest end of the text that a stop string begins with."""
    matcher = StopMatcher(stop_strings)
    if matcher.push(text) is None:
        assert matcher.num_undecided_bytes == undecided(text, stop_strings)


def test_the_longest_of_two_that_end_together_wins() -> None:
    """Where one stop string is the end of another, no byte of the longer one gets through."""
    assert StopMatcher([b"END", b"THE END"]).push(b"at THE END!") == (b"THE END", 1)


def test_the_first_to_end_wins_over_the_first_to_begin() -> None:
    """A stop string inside a longer one is decided before the longer one can be."""
    assert StopMatcher([b"abcd", b"bc"]).push(b"abcd") == (b"bc", 1)


def test_without_stop_strings_nothing_is_undecided() -> None:
    """No stop strings, nothing to wait for."""
    matcher = StopMatcher([])
    assert matcher.push(b"anything") is None
    assert matcher.num_undecided_bytes == 0
