"""Prompts, character by character and token by token under the World vocabulary."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.tokenizer.world import WorldTokenizer
from server.templates import BUILTIN, Message, Template, TemplateError, render

WORLD, G1, G1H, RAW = (BUILTIN[name] for name in ("world", "g1", "g1h", "raw"))
WORLD_V4, RAVEN, INSTRUCTION = (BUILTIN[name] for name in ("world-v4", "raven", "instruction"))
CHAT = [WORLD, G1, G1H, RAVEN, INSTRUCTION]

SYSTEM = Message("system", "Be brief.")
HI = Message("user", "hi")
HELLO = Message("assistant", "Hello")


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (WORLD, "System: Be brief.\n\nUser: hi\n\nAssistant:"),
        (G1, "System: Be brief.\n\nUser: hi\n\nAssistant: <think"),
        (G1H, "System✿Be brief.✿\nUser✿hi✿\nBot✿<think"),
        (RAW, "Be brief.hi"),
    ],
)
def test_first_turn(template: Template, text: str) -> None:
    """The first turn of a conversation is the system text, the question, and the beginning of the answer."""
    assert render([SYSTEM, HI], template, first=True).text == text


@pytest.mark.parametrize(
    ("template", "text", "token_ids"),
    [
        (WORLD, "\n\nUser: hi\n\nAssistant:", [261, 24281, 59, 4571, 261, 5585, 41693, 59]),
        (G1, "\n\nUser: hi\n\nAssistant: <think", [261, 24281, 59, 4571, 261, 5585, 41693, 59, 295, 35762]),
        (G1H, "✿\nUser✿hi✿\nBot✿<think", [10060, 11, 24281, 10060, 1922, 10060, 11, 5645, 10060, 61, 35762]),
        (RAW, "hi", [1922]),
    ],
)
def test_later_turn_closes_the_answer_before_it(template: Template, text: str, token_ids: list[int]) -> None:
    """A later turn begins with the border after the last answer, and has the token ids of training."""
    assert render([HI], template, first=False).text == text
    assert WorldTokenizer().encode(text) == token_ids


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (WORLD, "User: hi\n\nAssistant: Hello\n\nUser: hi\n\nAssistant:"),
        (G1, "User: hi\n\nAssistant: Hello\n\nUser: hi\n\nAssistant: <think"),
        (G1H, "User✿hi✿\nBot✿Hello✿\nUser✿hi✿\nBot✿<think"),
        (RAW, "hiHellohi"),
    ],
)
def test_resent_history(template: Template, text: str) -> None:
    """Answers that a client sends back are turns like the others."""
    assert render([HI, HELLO, HI], template, first=True).text == text


@pytest.mark.parametrize("template", CHAT)
def test_developer_is_system(template: Template) -> None:
    """OpenAI's newer name for the system role means the same."""
    newer = Message("developer", SYSTEM.content)
    assert render([newer, HI], template, first=True) == render([SYSTEM, HI], template, first=True)


@pytest.mark.parametrize(
    ("effort", "hint", "token_ids"),
    [
        (None, "", []),
        ("minimal", " (think a bit)", [275, 35762, 332, 21365, 42]),
        ("low", " (think a bit)", [275, 35762, 332, 21365, 42]),
        ("medium", " (think)", [275, 35762, 42]),
        ("high", " (think a lot)", [275, 35762, 332, 22031, 42]),
        ("xhigh", " (think a lot)", [275, 35762, 332, 22031, 42]),
    ],
)
def test_g1_says_how_long_to_think(effort: str | None, hint: str, token_ids: list[int]) -> None:
    """Reasoning effort is a hint after the question, in the trained words and tokens."""
    rendered = render([HI], G1, first=False, reasoning_effort=effort)
    assert rendered.text == f"\n\nUser: hi{hint}\n\nAssistant: <think"
    assert WorldTokenizer().encode(rendered.text)[4:-6] == token_ids
    assert rendered.opening.thinking


@pytest.mark.parametrize(
    ("template", "ending", "token_ids"),
    [
        (G1, "\n\nAssistant: <think></think", [261, 5585, 41693, 59, 295, 35762, 5439, 35762]),
        (G1H, "✿\nBot✿<think></think", [10060, 11, 5645, 10060, 61, 35762, 5439, 35762]),
        (WORLD, "\n\nAssistant:", [261, 5585, 41693, 59]),
    ],
)
def test_no_thinking(template: Template, ending: str, token_ids: list[int]) -> None:
    """Effort none gives the model an empty thought, without the last `>`, which it writes itself."""
    rendered = render([HI], template, first=False, reasoning_effort="none")
    assert rendered.text.endswith(ending)
    assert WorldTokenizer().encode(rendered.text)[-len(token_ids) :] == token_ids
    assert not rendered.opening.thinking


def test_hint_goes_to_the_question_only() -> None:
    """Earlier questions, and a system text at the end, are left alone."""
    assert render([HI, HELLO, HI], G1, first=True, reasoning_effort="high").text.count("(think a lot)") == 1
    assert "(think" not in render([HI, SYSTEM], G1, first=True, reasoning_effort="high").text


@pytest.mark.parametrize("template", CHAT)
@pytest.mark.parametrize(
    ("content", "cleaned"),
    [
        ("a\r\nb", "a\nb"),
        ("a\r\n\r\nb", "a\nb"),
        ("a\n\n\n\nb\n\nc", "a\nb\nc"),
        ("\n  a \n\n", "a"),
        ("if x:\n    y\n\n    z", "if x:\n    y\n    z"),
    ],
)
def test_questions_are_cleaned(template: Template, content: str, cleaned: str) -> None:
    """Blank lines, which would look like the end of a turn, become one newline; indentation is kept."""
    dirty = render([Message("system", content), Message("user", content)], template, first=True)
    assert dirty == render([Message("system", cleaned), Message("user", cleaned)], template, first=True)


@pytest.mark.parametrize("template", CHAT)
def test_answers_keep_their_blank_lines(template: Template) -> None:
    """What a client sends back as an answer loses only the space around it."""
    text = render([HI, Message("assistant", " one\n\n    two\n"), HI], template, first=True).text
    assert template.past_opening + template.lead + "one\n\n    two" + template.border in text


def test_what_follows_an_instruction_is_its_input() -> None:
    """A question is an instruction itself, unless a system text directly before it is: then it is the input to that."""
    parts = [SYSTEM, HI, HELLO, HI]
    told = "Instruction: Be brief.\n\nInput: hi\n\nResponse: Hello\n\nInstruction: hi\n\nResponse:"
    assert render(parts, INSTRUCTION, first=True).text == told
    assert render([HI], INSTRUCTION, first=True).text == "Instruction: hi\n\nResponse:"


def test_raw_changes_nothing() -> None:
    """The raw template concatenates contents as they are, and stops at nothing."""
    rendered = render([Message("user", " a\r\n\n\n✿ "), Message("user", "\n")], RAW, first=False)
    assert rendered.text == " a\r\n\n\n✿ \n"
    assert rendered.stop_strings == ()


TEXTS = st.text().filter(str.strip)


@pytest.mark.parametrize("template", [WORLD, RAW])
@given(
    questions=st.lists(TEXTS, min_size=1, max_size=4), answers=st.lists(TEXTS.map(str.strip), min_size=4, max_size=4)
)
def test_new_messages_continue_the_text_exactly(template: Template, questions: list[str], answers: list[str]) -> None:
    """Prompts and delivered answers, joined turn by turn, are the text of the whole history rendered at once."""
    told, history = "", []
    for turn, (question, answer) in enumerate(zip(questions, answers, strict=False)):
        history.append(Message("user", question))
        told += render([Message("user", question)], template, first=turn == 0).text
        assert told == render(history, template, first=True).text
        told += answer if template is RAW else " " + answer
        history.append(Message("assistant", answer))


@pytest.mark.parametrize("template", CHAT)
@given(content=st.text(alphabet="\n\r :Userytm"))
def test_a_question_cannot_end_its_turn(template: Template, content: str) -> None:
    """Whatever a question holds, the only border in the prompt is the one that ends it."""
    text = render([Message("user", "x" + content)], template, first=True).text
    assert text.count(template.border) == 1


@pytest.mark.parametrize("template", CHAT)
def test_prompts_never_end_in_a_space(template: Template) -> None:
    """A space at the end would be torn from the word the model is about to write."""
    for effort in (None, *template.efforts):
        text = render([HI], template, first=True, reasoning_effort=effort).text
        assert text == text.rstrip()


def test_stops() -> None:
    """An answer ends where the model begins to write another turn."""
    assert WORLD.stop_strings == G1.stop_strings == ("\n\nUser:", "\nUser:", "\n\nSystem:")
    assert G1H.stop_strings == ("✿",)
    assert WORLD_V4.stop_strings == ("\n\n", "\nUser:")
    assert RAVEN.stop_strings == ("\n\n", "\nBob:")
    assert INSTRUCTION.stop_strings == ("\n\nInstruction:", "\nInstruction:", "\n\nInput:")


@pytest.mark.parametrize(
    ("messages", "field", "said"),
    [
        ([], "messages", "no message"),
        ([Message("narrator", "42"), HI], "messages[0].role", "known are: system, developer, user, assistant, tool"),
        ([HI, HELLO], "messages[1].role", "can't be continued"),
        ([SYSTEM, Message("user", "")], "messages[1].content", "empty"),
    ],
)
@pytest.mark.parametrize("template", BUILTIN.values())
def test_messages_that_cannot_be_rendered(template: Template, messages: list[Message], field: str, said: str) -> None:
    """What a template has no form for is refused, and the error names the field."""
    with pytest.raises(TemplateError, match=said) as caught:
        render(messages, template, first=True)
    assert caught.value.field == field


@pytest.mark.parametrize("template", CHAT)
def test_blank_content_is_empty(template: Template) -> None:
    """Content of which cleaning leaves nothing is refused."""
    with pytest.raises(TemplateError, match="empty"):
        render([Message("user", " \r\n ")], template, first=True)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (WORLD, "User: hi\n\nAssistant:\n\nUser: hi\n\nAssistant:"),
        (G1, "User: hi\n\nAssistant:\n\nUser: hi\n\nAssistant: <think"),
    ],
)
def test_an_answer_may_be_empty(template: Template, text: str) -> None:
    """A model may have had nothing to say; a client that sends its answer back is not refused for that."""
    assert render([HI, Message("assistant", " "), HI], template, first=True).text == text


@pytest.mark.parametrize(
    "message", [Message("user", "a ✿ b"), Message("system", "✿"), Message("assistant", "✿\nUser✿x")]
)
def test_g1h_refuses_contents_that_forge_turns(message: Message) -> None:
    """The flower marks turns and nothing else."""
    with pytest.raises(TemplateError, match="marks the turns"):
        render([message, HI], G1H, first=True)


@pytest.mark.parametrize(("template", "effort"), [(WORLD, "high"), (RAW, "low"), (G1, "much"), (G1H, "")])
def test_efforts_that_a_template_does_not_know(template: Template, effort: str) -> None:
    """An effort without a form is refused with those that have one, never ignored."""
    with pytest.raises(TemplateError, match=r"accepted: .*none") as caught:
        render([HI], template, first=True, reasoning_effort=effort)
    assert caught.value.field == "reasoning_effort"
