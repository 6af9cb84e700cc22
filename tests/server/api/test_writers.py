"""The writers' short way for a chunk of text says what their general way says."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engine.messages import FinishReason
from engine.tokenizer.bytes import ByteTokenizer
from server.api.chat_writer import ChatWriter
from server.api.completions import CompletionWriter
from server.api.replays import chat_frames, completion_frames
from server.api.replies import Identity
from server.errors import ServerDraining, answer
from server.generation import ChoiceEvent, Delivered, Finished, Prompted, Started
from server.schemas.chat import ChatRequest
from server.schemas.completions import CompletionRequest
from server.services import ServedModel
from server.streaming import ReplyWriter
from server.templates import BUILTIN, Message, render
from tests.engine.scripted_engine import READY

MODEL = ServedModel('a "quoted" model', 1, READY)
IDENTITY = ("id", "object", "created", "model", "system_fingerprint")
PIECES = st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=4)

WriterMaker = Callable[..., ReplyWriter]


def chat_writer(**fields: Any) -> ChatWriter:
    """Return the writer of a chat request whose answers think first."""
    body = ChatRequest.model_validate({"messages": [{"role": "user", "content": "x"}], "n": 2, **fields})
    writer = ChatWriter(Identity("chatcmpl-1", MODEL), ByteTokenizer(), body)
    writer.expect(render([Message("user", "x")], BUILTIN["g1"], first=True, reasoning_effort="high"))
    return writer


def completion_writer(**fields: Any) -> CompletionWriter:
    """Return the writer of a completion request."""
    body = CompletionRequest.model_validate({"prompt": "x", "n": 2, **fields})
    return CompletionWriter(Identity("cmpl-1", MODEL), ByteTokenizer(), body)


def events_of(pieces: list[str]) -> Iterator[ChoiceEvent]:
    """Yield the events of a request with two choices that say the same."""
    for index in range(2):
        yield Started(index)
        yield Prompted(index, [1, 2], None)
    for piece in pieces:
        for index in range(2):
            yield Delivered(index, piece, [*piece.encode()], None)
    for index in range(2):
        yield Finished(index, FinishReason.STOP, None, 3, None)


def chunks_of(writer: ReplyWriter, pieces: list[str]) -> list[dict[str, Any]]:
    """Return the chunks of a whole stream, which must be framed and ended as clients expect."""
    data = writer.opening() + b"".join(map(writer.frames, events_of(pieces))) + writer.closing()
    *frames, done, end = data.split(b"\n\n")
    assert (done, end) == (b"data: [DONE]", b"")
    return [json.loads(frame.removeprefix(b"data: ")) for frame in frames]


def whole_text(choice: Any) -> str:
    """Return the text of a choice of a whole reply, its thought first."""
    if hasattr(choice, "text"):
        return str(choice.text)
    return (choice.message.reasoning_content or "") + choice.message.content  # UNSET counts as false


def without(chunks: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    """Return chunks without what only one of the ways says, and those that then say nothing."""
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    plain = [{key: value for key, value in choice.items() if key not in names} for choice in choices]
    return [choice for choice in plain if choice.get("text") or choice.get("delta") or choice["finish_reason"]]


@pytest.mark.parametrize("make", [chat_writer, completion_writer])
@given(pieces=PIECES)
@example([">\nwhy ", "not</thi", 'nk>\n\nyes "\\\x00\u2028\n', "", "😀"])
@example([">not</think>\n\nboth"])
def test_the_short_way_says_what_the_general_way_says(make: WriterMaker, pieces: list[str]) -> None:
    """Asking for token ids, which templates cannot say, changes nothing else."""
    short, general = (chunks_of(make(**fields), pieces) for fields in ({}, {"return_token_ids": True}))
    assert without(short) == without(general, "token_ids", "prompt_token_ids")
    assert len({tuple(map(chunk.get, IDENTITY)) for chunk in short}) == 1


@pytest.mark.parametrize("make", [chat_writer, completion_writer])
@given(pieces=PIECES)
def test_a_stream_put_together_is_the_whole_reply(make: WriterMaker, pieces: list[str]) -> None:
    """Its texts are those that the same request gets without streaming."""
    streamed = {0: "", 1: ""}
    for chunk in chunks_of(make(), pieces):
        for choice in chunk["choices"]:
            said = choice["delta"] if "delta" in choice else {"content": choice["text"]}
            streamed[choice["index"]] += said.get("reasoning_content", "") + said.get("content", "")
    writer = make()
    for event in events_of(pieces):
        writer.add(event)
    for choice in writer.reply().choices:  # type: ignore[attr-defined]
        assert streamed[choice.index] == whole_text(choice)


@pytest.mark.parametrize(("make", "frames_of"), [(chat_writer, chat_frames), (completion_writer, completion_frames)])
@given(pieces=PIECES)
def test_a_whole_reply_can_be_streamed_again(
    make: WriterMaker, frames_of: Callable[..., bytes], pieces: list[str]
) -> None:
    """Its chunks, put together, say what the stream said that came token by token, usage included."""
    fields = {"return_token_ids": True, "stream": True, "stream_options": {"include_usage": True}}
    streamed = merged(chunks_of(make(**fields), pieces))
    writer = make(**fields)
    for event in events_of(pieces):
        writer.add(event)
    data = frames_of(msgspec.json.encode(writer.reply()), include_usage=True)
    *frames, done, _ = data.split(b"\n\n")
    assert done == b"data: [DONE]"
    assert merged([json.loads(frame.removeprefix(b"data: ")) for frame in frames]) == streamed


def merged(chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what the chunks say of each choice, and in the last one of the whole."""
    choices: list[dict[str, Any]] = [{"text": "", "thought": "", "token_ids": []} for _ in range(2)]
    for chunk in chunks[:-1]:
        assert chunk["usage"] is None
        for part in chunk["choices"]:
            choice = choices[part["index"]]
            said = part.get("delta") or {"content": part.get("text", "")}
            choice["text"] += said.get("content") or ""
            choice["thought"] += said.get("reasoning_content") or ""
            choice["token_ids"] += part.get("token_ids", [])
            choice["finish_reason"] = part["finish_reason"]
    return [
        *choices,
        {"usage": chunks[-1]["usage"], **{name: chunks[-1][name] for name in IDENTITY if name != "created"}},
    ]


@pytest.mark.parametrize("make", [chat_writer, completion_writer])
def test_usage_that_is_asked_for_is_in_every_chunk_but_only_said_at_the_end(make: WriterMaker) -> None:
    """Null until then, as OpenAI has it."""
    chunks = chunks_of(make(stream=True, stream_options={"include_usage": True}), ["a", "b"])
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["usage"]["completion_tokens"] == 6
    assert chunks[-1]["choices"] == []


@pytest.mark.parametrize("make", [chat_writer, completion_writer])
def test_a_failure_is_an_event_with_an_error(make: WriterMaker) -> None:
    """And nothing after it."""
    told = answer(ServerDraining())
    assert make().failure(told) == b"data: " + told.render() + b"\n\n"
