"""Prompts in pieces: a history that is sent whole gets the tokens it got turn by turn."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.tokenizer import Tokenizer
from engine.tokenizer.bytes import ByteTokenizer
from engine.tokenizer.hf import HuggingFaceTokenizer
from engine.tokenizer.world import WorldTokenizer
from server.services import encode_pieces
from server.templates import BUILTIN, Answer, Message, Opening, Part, Template, render, render_remembered

WORLD, G1, G1H, RAW, INSTRUCTION = (BUILTIN[name] for name in ("world", "g1", "g1h", "raw", "instruction"))
BUNDLED = Path(__file__).parents[3] / "models/default/tokenizer.json"
TOKENIZERS = [ByteTokenizer(), WorldTokenizer(), HuggingFaceTokenizer(BUNDLED, vocab_size=1 << 16)]

SYSTEM = Message("system", "Be brief.")
HI = Message("user", "hi")
HELLO = Message("assistant", "Hello")


@pytest.mark.parametrize(
    ("template", "pieces"),
    [
        (WORLD, ("System: Be brief.\n\n", "User: hi\n\nAssistant:", " Hello", "\n\nUser: hi\n\nAssistant:")),
        (G1, ("System: Be brief.\n\n", "User: hi\n\nAssistant:", " Hello", "\n\nUser: hi\n\nAssistant: <think")),
        (G1H, ("System✿Be brief.✿\n", "User✿hi✿\nBot✿", "Hello", "✿\nUser✿hi✿\nBot✿<think")),
        (RAW, ("Be brief.hi", "Hello", "hi")),
    ],
)
def test_a_piece_ends_where_the_model_took_over_and_where_it_ended(template: Template, pieces: tuple[str, ...]) -> None:
    """After the system prompt, the opening of every answer, and every answer, which begins as the model begins it."""
    assert render([SYSTEM, HI, HELLO, HI], template, first=True).pieces == pieces


def test_an_answer_of_known_tokens_stays_these_tokens() -> None:
    """Ids that were sampled are a piece as they are, after the opening they were sampled for."""
    parts = [HI, Answer("Assistant: <think", (63, 1, 2)), HI]
    rendered = render(parts, G1, first=False, reasoning_effort="none")
    assert rendered.pieces == (
        "\n\nUser: hi\n\nAssistant: <think",
        (63, 1, 2),
        "\n\nUser: hi\n\nAssistant: <think></think",
    )
    with pytest.raises(TypeError, match="no text"):
        _ = rendered.text


@pytest.mark.parametrize("written", ["", ()])
def test_an_answer_without_tokens_is_no_piece(written: str | tuple[int, ...]) -> None:
    """Its opening and the border after it still are."""
    pieces = render([HI, Answer("Assistant:", written), HI], WORLD, first=True).pieces
    assert pieces == ("User: hi\n\nAssistant:", "\n\nUser: hi\n\nAssistant:")


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda tokenizer: type(tokenizer).__name__)
@pytest.mark.parametrize("template", [WORLD, G1, G1H])
@pytest.mark.parametrize("content", ["Be brief.", "Be brief", "1. A\n2. B:", "好。"])
def test_a_system_prompt_parted_from_its_user_has_the_tokens_of_the_whole(
    tokenizer: Tokenizer, template: Template, content: str
) -> None:
    """No token reaches from the end of a line into the next: the model reads what it was trained on."""
    rendered = render([Message("system", content), HI], template, first=True)
    assert rendered.has_preamble
    token_ids, (end,) = encode_pieces(tokenizer, rendered.pieces)
    assert token_ids == tokenizer.encode(rendered.text)
    assert tokenizer.decode(token_ids[:end]) == rendered.pieces[0]


def test_only_system_prompts_that_begin_a_history_are_parted_from_it() -> None:
    """One that comes later belongs to its turn, and one alone ends with it."""
    assert not render([SYSTEM, HI], WORLD, first=False).has_preamble
    assert not render([HI, SYSTEM], WORLD, first=True).has_preamble
    assert not render([SYSTEM], WORLD, first=True).has_preamble
    assert not render([SYSTEM, HI], RAW, first=True).has_preamble
    assert render([SYSTEM, SYSTEM, HI], WORLD, first=True).pieces[0] == "System: Be brief.\n\n" * 2


def test_borders_are_the_ends_of_all_pieces_but_the_last() -> None:
    """They ascend and lie inside the prompt, whatever is empty."""
    assert encode_pieces(ByteTokenizer(), ("ab", (7, 8, 9), "", "c", ())) == ([97, 98, 7, 8, 9, 99], [2, 5])
    assert encode_pieces(ByteTokenizer(), ("ab",)) == ([97, 98], [])
    assert encode_pieces(ByteTokenizer(), ()) == ([], [])


# What a model may write: its own words after the lead, blank lines within, no space around.
ANSWERS = st.text(st.sampled_from("ab .,\n好。é"), min_size=1).map(str.strip).filter(bool)
QUESTIONS = st.text(st.sampled_from("ab :\n\r好é?"), min_size=1).filter(str.strip)


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda tokenizer: tokenizer.name)
@pytest.mark.parametrize("template", [WORLD, G1, G1H, RAW, INSTRUCTION], ids=lambda template: template.name)
@given(questions=st.lists(QUESTIONS, min_size=1, max_size=4), answers=st.lists(ANSWERS, min_size=4, max_size=4))
def test_a_resent_history_has_the_tokens_of_the_conversation(
    tokenizer: Tokenizer, template: Template, questions: list[str], answers: list[str]
) -> None:
    """Rendered and encoded whole it equals what was consumed turn by turn, and it can be resumed at every turn.

    Sent as text, where the answers were given without a thought; as tokens, always.
    """
    for opening in (template.past_opening, template.opening.text):
        spoken = msgspec.structs.replace(template, opening=Opening(opening))
        held: list[int] = []
        ends: list[int] = []
        as_text: list[Part] = []
        as_tokens: list[Part] = []
        for turn, (question, answer) in enumerate(zip(questions, answers, strict=False)):
            asked = Message("user", question)
            asked_ids, _ = encode_pieces(tokenizer, render([asked], spoken, first=turn == 0).pieces)
            for parts in [as_tokens, as_text] if opening == spoken.past_opening else [as_tokens]:
                whole = encode_pieces(tokenizer, render([*parts, asked], spoken, first=True).pieces)
                assert whole == (held + asked_ids, ends)
            answer_ids = tokenizer.encode(spoken.lead + answer)
            ends += [len(held + asked_ids), len(held + asked_ids + answer_ids)]
            held += asked_ids + answer_ids
            as_text += [asked, Message("assistant", answer)]
            as_tokens += [asked, Answer(opening, tuple(answer_ids))]


@pytest.mark.parametrize("template", [WORLD, G1, G1H, RAW, INSTRUCTION])
@pytest.mark.parametrize("first", [True, False])
def test_what_is_remembered_without_a_thought_is_how_a_history_is_rendered(template: Template, first: bool) -> None:
    """Prompt and answer are the pieces that an answer sent as text gets, whatever thought it began with."""
    pieces, answer = render_remembered(
        [SYSTEM, HI], template, "\nHello\n" if template is not RAW else "Hello", first=first
    )
    whole = render([SYSTEM, HI, HELLO, HI], template, first=first).pieces
    assert (*pieces, answer) == whole[: len(pieces) + 1]
    assert render_remembered([HI], template, "", first=first)[1] == ""
