"""What a chat completion says: its chunks, or the whole of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec

from engine.messages import TokenLogprobs
from engine.tokenizer import Tokenizer
from server.api.replies import (
    Identity,
    Meter,
    ThoughtCounter,
    clamped,
    finish_reason,
    most_likely,
    stop_reason,
)
from server.errors import Answer
from server.frames import DONE, FrameTemplate, frame
from server.generation import (
    ChoiceEvent,
    Delivered,
    Finished,
    Prompted,
    Started,
)
from server.items import new_id
from server.schemas.chat import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatRequest,
    ChoiceLogprobs,
    Delta,
    FunctionDelta,
    TokenLogprob,
    ToolCallDelta,
    TopLogprob,
)
from server.templates import (
    AnswerReader,
    AnswerText,
    RenderedPrompt,
)


class ChatWriter:
    """What a chat completion says."""

    def __init__(
        self, identity: Identity, tokenizer: Tokenizer, body: ChatRequest, call_ids: list[str] | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._body = body
        self._identity = identity
        self._meter = Meter(body.n)
        self._meter.thoughts = []
        self.call_ids = call_ids or [new_id("call") for _ in range(body.n)]
        self._prompt: RenderedPrompt | None = None
        self._readers: list[AnswerReader] = []
        self._prompt_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
        self._choices = [ChatChoice(index=index, message=AssistantMessage()) for index in range(body.n)]
        self._says_only_text = not (body.return_token_ids or body.logprobs)
        self._said = [self._template(index, lambda text: Delta(content=text)) for index in range(body.n)]
        self._thought = [self._template(index, lambda text: Delta(reasoning_content=text)) for index in range(body.n)]

    def expect(self, prompt: RenderedPrompt) -> None:
        """Read the answers as answers to `prompt`."""
        self._prompt = prompt
        if prompt.opening.thinking:
            self._meter.thoughts = [ThoughtCounter(self._tokenizer) for _ in range(self._body.n)]
        self._readers = [AnswerReader(prompt.opening, self._body.toolbox) for _ in range(self._body.n)]

    def again(self) -> ChatWriter:
        """Return a writer that is still to say the same."""
        writer = ChatWriter(self._identity, self._tokenizer, self._body, self.call_ids)
        if self._prompt is not None:
            writer.expect(self._prompt)
        return writer

    def opening(self) -> bytes:
        """Return nothing: a choice begins when it has a slot."""
        return b""

    def frames(self, event: ChoiceEvent) -> bytes:
        """Return a chunk for all that the event adds to its choice."""
        if isinstance(event, Delivered) and self._says_only_text:
            self._meter.see(event)
            return self._text_frames(event.index, self._readers[event.index].push(event.text))
        return b"".join(frame(self._chunk_of(part)) for part in self._parts(event))

    def _text_frames(self, index: int, text: AnswerText) -> bytes:
        is_call = text.call_name is not None or text.call_arguments
        if is_call or (text.content and text.reasoning):
            return frame(self._chunk_of(ChatChunkChoice(index=index, delta=self._delta(index, text))))
        if text.content:
            return self._said[index].fill(text.content)
        return self._thought[index].fill(text.reasoning) if text.reasoning else b""

    def _template(self, index: int, delta: Callable[[str], Delta]) -> FrameTemplate:
        return FrameTemplate(lambda text: frame(self._chunk_of(ChatChunkChoice(index=index, delta=delta(text)))))

    def closing(self) -> bytes:
        """Return the usage, if asked for, and the end."""
        if not self._body.stream_options.include_usage:
            return DONE
        chunk = self._chunk([])
        chunk.usage = self._meter.usage
        chunk.conversation = self._meter.conversation
        return frame(chunk) + DONE

    def failure(self, told: Answer) -> bytes:
        """Return the error, in place of the end."""
        return frame(told.body)

    def add(self, event: ChoiceEvent) -> None:
        """Add what the event brings to its choice."""
        for part in self._parts(event):
            self._merge(part)

    def _parts(self, event: ChoiceEvent) -> Iterator[ChatChunkChoice]:
        """Yield what the event adds to its choice, if a reader can see it."""
        self._meter.see(event)
        if isinstance(event, Started):
            yield ChatChunkChoice(index=event.index, delta=Delta(role="assistant", content=""))
        elif isinstance(event, Prompted) and self._body.return_token_ids:
            self._prompt_ids = event.prompt_ids
        elif isinstance(event, Delivered):
            yield from self._delivered(event)
        elif isinstance(event, Finished):
            yield from self._finished(event)

    def _delivered(self, event: Delivered) -> Iterator[ChatChunkChoice]:
        part = ChatChunkChoice(
            index=event.index, delta=self._delta(event.index, self._readers[event.index].push(event.text))
        )
        if self._body.return_token_ids:
            part.token_ids = event.token_ids
        if event.logprobs is not None:
            part.logprobs = _logprobs(self._tokenizer, event.token_ids, event.logprobs)
        if part.delta != NOTHING or not self._says_only_text:
            yield part

    def _finished(self, event: Finished) -> Iterator[ChatChunkChoice]:
        reader = self._readers[event.index]
        rest = self._delta(event.index, reader.flush())
        if rest != NOTHING:
            yield ChatChunkChoice(index=event.index, delta=rest)
        reason = "tool_calls" if reader.has_called else finish_reason(event)
        yield ChatChunkChoice(index=event.index, delta=NOTHING, finish_reason=reason, stop_reason=stop_reason(event))

    def _chunk_of(self, part: ChatChunkChoice) -> ChatChunk:
        """Return `part` as a chunk; the choice's last one says where its conversation stands."""
        chunk = self._chunk([part])
        if part.finish_reason is not None:
            chunk.conversation = self._meter.conversation
            chunk.prompt_token_ids = self._prompt_ids
        if self._body.stream_options.include_usage:
            chunk.usage = None
        return chunk

    def _delta(self, index: int, text: AnswerText) -> Delta:
        calls: list[ToolCallDelta] | None = None
        if text.call_name is not None:
            function = FunctionDelta(name=text.call_name, arguments=text.call_arguments)
            calls = [ToolCallDelta(index=0, id=self.call_ids[index], type="function", function=function)]
        elif text.call_arguments:
            calls = [ToolCallDelta(index=0, function=FunctionDelta(arguments=text.call_arguments))]
        return Delta(content=text.content or None, reasoning_content=text.reasoning or None, tool_calls=calls)

    def _merge(self, part: ChatChunkChoice) -> None:
        choice = self._choices[part.index]
        choice.message.add(part.delta)
        choice.finish_reason = part.finish_reason or choice.finish_reason
        choice.stop_reason = part.stop_reason if part.stop_reason is not None else choice.stop_reason
        if part.logprobs is not None:
            choice.logprobs = choice.logprobs or ChoiceLogprobs([])
            choice.logprobs.content.extend(part.logprobs.content)
        if part.token_ids is not msgspec.UNSET:
            choice.token_ids = [] if choice.token_ids is msgspec.UNSET else choice.token_ids
            choice.token_ids += part.token_ids

    def reply(self) -> ChatCompletion:
        """Return the whole reply."""
        return ChatCompletion(
            id=self._identity.id,
            created=self._identity.created,
            model=self._identity.model,
            system_fingerprint=self._identity.system_fingerprint,
            choices=self._choices,
            usage=self._meter.usage,
            prompt_token_ids=self._prompt_ids,
            conversation=self._meter.conversation,
        )

    def _chunk(self, choices: list[ChatChunkChoice]) -> ChatChunk:
        return ChatChunk(
            id=self._identity.id,
            created=self._identity.created,
            model=self._identity.model,
            system_fingerprint=self._identity.system_fingerprint,
            choices=choices,
        )


NOTHING = Delta()


def _logprobs(tokenizer: Tokenizer, token_ids: list[int], entries: list[TokenLogprobs]) -> ChoiceLogprobs:
    return ChoiceLogprobs(
        [_token_logprob(tokenizer, token_id, entry) for token_id, entry in zip(token_ids, entries, strict=True)]
    )


def _token_logprob(tokenizer: Tokenizer, token_id: int, entry: TokenLogprobs) -> TokenLogprob:
    return TokenLogprob(
        token=tokenizer.token_text(token_id),
        logprob=clamped(entry.logprob),
        bytes=list(tokenizer.token_bytes(token_id)),
        top_logprobs=[
            TopLogprob(tokenizer.token_text(top_id), value, list(tokenizer.token_bytes(top_id)))
            for top_id, value in most_likely(entry)
        ],
    )
