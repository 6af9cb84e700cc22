"""Replies that were kept, told again: as they were, or as streams of as few chunks as there can be."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec
from fastapi import Response

from server.frames import DONE, frame
from server.idempotency import REPLAYED
from server.schemas.chat import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    Delta,
    FunctionDelta,
    ToolCallDelta,
)
from server.schemas.completions import Completion, CompletionChoice
from server.streaming import STREAM_HEADERS


def replayed(reply: bytes, frames_of: Callable[[bytes], bytes], *, stream: bool) -> Response:
    """Return a kept reply, as JSON or as the stream that `frames_of` makes of it."""
    if stream:
        return Response(frames_of(reply), headers=STREAM_HEADERS | REPLAYED, media_type="text/event-stream")
    return Response(reply, headers=REPLAYED, media_type="application/json")


def chat_frames(reply: bytes, *, include_usage: bool) -> bytes:
    """Return a chat completion as a stream."""
    whole = msgspec.json.decode(reply, type=ChatCompletion)

    def chunk(choices: list[ChatChunkChoice]) -> ChatChunk:
        return ChatChunk(
            id=whole.id,
            created=whole.created,
            model=whole.model,
            system_fingerprint=whole.system_fingerprint,
            choices=choices,
            usage=None if include_usage else msgspec.UNSET,
        )

    frames = []
    for choice in whole.choices:
        *parts, last = map(chunk, ([part] for part in _chat_parts(choice)))
        last.conversation, last.prompt_token_ids = whole.conversation, whole.prompt_token_ids
        frames += [*parts, last]
    if include_usage:
        end = chunk([])
        end.usage, end.conversation = whole.usage, whole.conversation
        frames.append(end)
    return b"".join(map(frame, frames)) + DONE


def _chat_parts(choice: ChatChoice) -> Iterator[ChatChunkChoice]:
    """Yield the beginning, what is said, and the end."""
    message, index = choice.message, choice.index
    yield ChatChunkChoice(index=index, delta=Delta(role=message.role, content=""))
    calls = [
        ToolCallDelta(
            index=place,
            id=call.id,
            type=call.type,
            function=FunctionDelta(name=call.function.name, arguments=call.function.arguments),
        )
        for place, call in enumerate(message.tool_calls or ())
    ]
    said = Delta(
        content=message.content or None, reasoning_content=message.reasoning_content or None, tool_calls=calls or None
    )
    if said != Delta() or choice.logprobs is not None or choice.token_ids is not msgspec.UNSET:
        yield ChatChunkChoice(index=index, delta=said, logprobs=choice.logprobs, token_ids=choice.token_ids)
    yield ChatChunkChoice(
        index=index, delta=Delta(), finish_reason=choice.finish_reason, stop_reason=choice.stop_reason
    )


def completion_frames(reply: bytes, *, include_usage: bool) -> bytes:
    """Return a completion as a stream."""
    whole = msgspec.json.decode(reply, type=Completion)

    def chunk(choices: list[CompletionChoice]) -> Completion:
        usage = None if include_usage else msgspec.UNSET
        return msgspec.structs.replace(whole, choices=choices, usage=usage, conversation=msgspec.UNSET)

    frames = []
    for choice in whole.choices:
        end = CompletionChoice(
            index=choice.index, text="", finish_reason=choice.finish_reason, stop_reason=choice.stop_reason
        )
        said = msgspec.structs.replace(choice, finish_reason=None, stop_reason=None)
        last = chunk([end])
        last.conversation = whole.conversation
        frames += [chunk([said]), last]
    if include_usage:
        frames.append(msgspec.structs.replace(whole, choices=[]))
    return b"".join(map(frame, frames)) + DONE
