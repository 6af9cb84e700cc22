import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.messages import TokenLogprobs
from engine.scheduler.output_gate import OutputGate, SampledToken, StopMatch, spell
from tests.engine.scheduler.test_stop_matcher import first_match, undecided
from tests.engine.stub_vocabulary import LETTERS, StubVocabulary

TOKEN_IDS = st.lists(st.integers(0, len(LETTERS.tokens) - 1), max_size=30)
STOP_STRINGS = st.lists(st.text(alphabet="abc", min_size=1, max_size=6).map(str.encode), max_size=3)


def ids(tokens: list[SampledToken]) -> list[int]:
    """Return the ids of `tokens`."""
    return [token.token_id for token in tokens]


def run(token_ids: list[int], stop_strings: list[bytes]) -> tuple[list[int], StopMatch | None]:
    """Return what a gate delivers of `token_ids`, and the match that ended it."""
    gate = OutputGate(LETTERS, stop_strings)
    delivered: list[int] = []
    for token_id in token_ids:
        released, match = gate.push(SampledToken(token_id))
        delivered += ids(released)
        if match is not None:
            return delivered + ids(match.remnant), match
    return delivered + ids(gate.flush()), None


@given(TOKEN_IDS, STOP_STRINGS)
def test_delivers_the_text_before_the_first_stop_string(token_ids: list[int], stop_strings: list[bytes]) -> None:
    """What comes out is the text up to the stop string to the byte, and the tokens themselves where none is cut."""
    text = LETTERS.decode(token_ids)
    expected = first_match(text, stop_strings)
    delivered, match = run(token_ids, stop_strings)
    if expected is None:
        assert match is None
        assert delivered == token_ids
    else:
        assert match is not None
        assert match.stop_string == expected[0]
        assert match.num_lost_bytes == 0
        assert LETTERS.decode(delivered) == text[: expected[1] - len(expected[0])]
        num_whole = len(delivered) - len(match.remnant)
        assert delivered[:num_whole] == token_ids[:num_whole]


@given(TOKEN_IDS, STOP_STRINGS)
def test_holds_back_no_more_and_no_less_than_it_must(token_ids: list[int], stop_strings: list[bytes]) -> None:
    """After every token, exactly the tokens without an undecided byte have been released."""
    gate = OutputGate(LETTERS, stop_strings)
    released_ids: list[int] = []
    for num_pushed, token_id in enumerate(token_ids, start=1):
        released, match = gate.push(SampledToken(token_id))
        if match is not None:
            return
        released_ids += ids(released)
        text = LETTERS.decode(token_ids[:num_pushed])
        num_decided = len(text) - undecided(text, stop_strings)
        assert gate.num_held == num_pushed - len(released_ids)
        assert len(LETTERS.decode(released_ids)) <= num_decided
        assert gate.num_held == 0 or len(LETTERS.decode(token_ids[: len(released_ids) + 1])) > num_decided


def test_the_remnant_carries_the_log_probabilities_of_the_token_it_was_cut_from() -> None:
    """A piece of a token that was cut was never sampled itself."""
    logprobs = TokenLogprobs(-1.5)
    gate = OutputGate(LETTERS, [b"c"])
    _, match = gate.push(SampledToken(LETTERS.tokens.index(b"abc"), logprobs))
    assert match is not None
    assert match.remnant == [SampledToken(LETTERS.tokens.index(b"ab"), logprobs)]


def test_a_remnant_is_spelt_byte_by_byte_when_it_must_be() -> None:
    """A vocabulary that refuses the remnant in one piece may still know its bytes."""

    class Whole(StubVocabulary):
        def encode_bytes(self, data: bytes) -> list[int]:
            return super().encode_bytes(data if len(data) == 1 else b"c")

    assert spell(Whole([b"a", b"b", b"c"]), b"ab") == [0, 1]


def test_a_remnant_that_no_token_can_spell_is_lost_and_counted() -> None:
    """Bytes that cannot be delivered are not delivered as other bytes."""
    vocabulary = StubVocabulary([b"a", b"xya"], spellable=[b"a"])
    _, match = OutputGate(vocabulary, [b"a"]).push(SampledToken(1))
    assert match == StopMatch(b"a", [], num_lost_bytes=2)


@pytest.mark.parametrize("data", [b"", b"a", b"abcab"])
def test_spelling_round_trips(data: bytes) -> None:
    """Spelled tokens have exactly the bytes."""
    assert LETTERS.decode(spell(LETTERS, data)) == data
