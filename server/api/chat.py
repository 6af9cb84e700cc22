"""`POST /v1/chat/completions`: answer messages; in a conversation, the new ones only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import msgspec
from fastapi import APIRouter, Depends, Request, Response

from engine.messages import TokenLogprobs
from engine.tokenizer import Tokenizer
from server.api.replies import Identity, Meter, clamped, finish_reason, most_likely, stop_reason
from server.api.requests import (
    check_model,
    check_num_logprobs,
    conversation_of,
    expected_version,
    initial_state_of,
    limited,
    with_choice,
)
from server.conversations.ledger import Conversation
from server.conversations.turns import ModelMismatch
from server.generation import (
    ChoiceEvent,
    ChoicePlan,
    Delivered,
    Finished,
    Generation,
    Prompted,
    Started,
    generate_choices,
    generate_turn,
)
from server.parsing import json_body
from server.schemas.chat import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatRequest,
    ChoiceLogprobs,
    Delta,
    TokenLogprob,
    TopLogprob,
)
from server.services import Services, ServicesOf
from server.streaming import respond
from server.templates import BUILTIN, AnswerReader, AnswerText, Message, RenderedPrompt, Template, render

router = APIRouter()


@router.post("/v1/chat/completions")
async def create_chat_completion(
    request: Request, body: Annotated[ChatRequest, Depends(json_body(ChatRequest))], services: ServicesOf
) -> Response:
    """Answer the messages."""
    check_model(body.model, services)
    version = expected_version(request, body)
    planner = Planner(services, body)
    writer = ChatWriter(services, body)

    async def work(generation: Generation) -> None:
        selector = conversation_of(body, services)
        if selector is None:
            prompt = planner.render(services.template, first=True)
            writer.expect(prompt)
            await generate_choices(services, generation, await planner.plans(prompt))
            return
        async with services.turns.open(selector, if_match=version, queue_seconds=body.queue_ms / 1000) as turn:
            head = turn.conversation
            prompt = planner.render(template_of(head), first=head.version == 0)
            writer.expect(prompt)
            await generate_turn(services, generation, turn, (await planner.plans(prompt))[0])

    generation = Generation(services.drain, work)
    return await respond(request, generation, writer, services.metrics.http, stream=body.stream)


def template_of(head: Conversation) -> Template:
    """Return the template in which the conversation's borders are written."""
    try:
        return BUILTIN[head.template]
    except KeyError:
        raise ModelMismatch("the conversation is written in a chat template that is not known any more") from None


class Planner:
    """What to generate for a request."""

    def __init__(self, services: Services, body: ChatRequest) -> None:
        self._services = services
        self._body = body
        self._max_tokens = limited(
            "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens",
            body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
            services.settings.max_output_tokens,
            services.settings.max_output_tokens,
        )
        num_logprobs = check_num_logprobs("top_logprobs", body.num_logprobs, services)
        self._sampling = body.sampling(services.tokenizer.vocab_size, num_logprobs)
        self._initial_state = initial_state_of(body.initial_state, services)

    def render(self, template: Template, *, first: bool) -> RenderedPrompt:
        """Return the messages as the model was trained on them; raises `TemplateError`."""
        messages = [Message(message.role, message.text) for message in self._body.messages]
        return render(messages, template, first=first, reasoning_effort=self._body.reasoning_effort)

    async def plans(self, prompt: RenderedPrompt) -> list[ChoicePlan]:
        """Return `n` choices of the prompt."""
        tokenizer = self._services.tokenizer
        prompt_ids = await self._services.encode(prompt.text)
        stop = self._body.stop_rules(
            self._max_tokens, tokenizer.vocab_size, tokenizer.eos_token_ids, prompt.stop_strings
        )
        return [
            ChoicePlan(index, prompt_ids, with_choice(self._sampling, index), stop, initial_state=self._initial_state)
            for index in range(self._body.n)
        ]


class ChatWriter:
    """What a chat completion says."""

    def __init__(self, services: Services, body: ChatRequest) -> None:
        self._tokenizer = services.tokenizer
        self._body = body
        self._identity = Identity("chatcmpl", services.model)
        self._meter = Meter(body.n)
        self._readers: list[AnswerReader] = []
        self._prompt_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
        self._choices = [ChatChoice(index=index, message=AssistantMessage()) for index in range(body.n)]

    def expect(self, prompt: RenderedPrompt) -> None:
        """Read the answers as answers to `prompt`."""
        self._readers = [AnswerReader(prompt.opening) for _ in range(self._body.n)]

    def parts(self, event: ChoiceEvent) -> Iterator[ChatChunkChoice]:
        """Return what the event adds to its choice, if a reader can see it."""
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
        part = ChatChunkChoice(index=event.index, delta=_delta(self._readers[event.index].push(event.text)))
        if self._body.return_token_ids:
            part.token_ids = event.token_ids
        if event.logprobs is not None:
            part.logprobs = _logprobs(self._tokenizer, event.token_ids, event.logprobs)
        if part.delta != NOTHING or self._body.return_token_ids or self._body.logprobs:
            yield part

    def _finished(self, event: Finished) -> Iterator[ChatChunkChoice]:
        rest = _delta(self._readers[event.index].flush())
        if rest != NOTHING:
            yield ChatChunkChoice(index=event.index, delta=rest)
        yield ChatChunkChoice(
            index=event.index, delta=NOTHING, finish_reason=finish_reason(event), stop_reason=stop_reason(event)
        )

    def chunk(self, part: ChatChunkChoice) -> ChatChunk:
        """Return `part` as an event of a stream; the choice's last one says where its conversation stands."""
        chunk = self._chunk([part])
        if part.finish_reason is not None:
            chunk.conversation = self._meter.conversation
            chunk.prompt_token_ids = self._prompt_ids
        if self._body.stream_options.include_usage:
            chunk.usage = None
        return chunk

    def closing_chunks(self) -> Iterator[ChatChunk]:
        """Return the usage, if asked for."""
        if self._body.stream_options.include_usage:
            chunk = self._chunk([])
            chunk.usage = self._meter.usage
            chunk.conversation = self._meter.conversation
            yield chunk

    def merge(self, part: ChatChunkChoice) -> None:
        """Add `part` to its choice."""
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


def _delta(text: AnswerText) -> Delta:
    return Delta(content=text.content or None, reasoning_content=text.reasoning or None)


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
