"""`POST /v1/chat/completions`: answer messages; in a conversation, the new ones only."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import cached_property, partial
from typing import Annotated

import msgspec
from fastapi import Depends, Request, Response

from engine.messages import FinishReason
from server.api.chat_writer import ChatWriter
from server.api.operations import IDEMPOTENCY_KEY, IF_MATCH, TURN_ERRORS, Router
from server.api.replays import chat_frames, replayed
from server.api.replies import (
    Identity,
    new_reply_id,
)
from server.api.requests import (
    Remembered,
    answering,
    begin,
    check_model,
    check_num_logprobs,
    conversation_of,
    expected_version,
    initial_state_of,
    limited,
    with_choice,
    with_reply,
    without_thought,
)
from server.conversations.ledger import Conversation, Item, LedgerError
from server.conversations.open_turn import Base, ModelMismatch, OpenTurn, TurnContent
from server.conversations.turns import ConversationSelector
from server.generation import (
    ChoicePlan,
    Generation,
    Outcome,
    borders_of,
    generate_choices,
    generate_turn,
)
from server.idempotency import Attempt, Kept, key_of
from server.items import AnswerIds, answered, called, parts_of, returned, said
from server.parsing import json_body
from server.schemas import chat as schemas
from server.schemas.chat import (
    ChatChunk,
    ChatCompletion,
    ChatRequest,
)
from server.services import Services, ServicesOf
from server.streaming import respond, whole_reply
from server.templates import (
    BUILTIN,
    Message,
    Opening,
    Part,
    RenderedPrompt,
    Template,
    ToolCall,
    read_answer,
    render,
    tools_text,
)
from server.tenants import tenant_of

router = Router()


@router.operation(
    "POST",
    "/v1/chat/completions",
    body=ChatRequest,
    reply=ChatCompletion,
    chunk=ChatChunk,
    errors=TURN_ERRORS,
    headers=[IF_MATCH, IDEMPOTENCY_KEY],
)
async def create_chat_completion(
    request: Request, body: Annotated[ChatRequest, Depends(json_body(ChatRequest))], services: ServicesOf
) -> Response:
    """Answer the messages."""
    check_model(body.model, services)
    version = expected_version(request, body)
    planner = Planner(services, body)
    selector = conversation_of(body, services, tenant_of(request))
    key = await key_of(request, "" if selector is None else selector.conversation_id)
    attempt = await services.claims.attempt(key, new_reply_id("chatcmpl"))
    if isinstance(attempt, Kept):
        frames = partial(chat_frames, include_usage=body.stream_options.include_usage)
        return replayed(attempt.reply, frames, stream=body.stream)
    writer = ChatWriter(Identity(attempt.reply_id, services.model), services.tokenizer, body)
    work = Work(services, body, tenant_of(request), planner, attempt, writer)
    answer = work.alone if selector is None else partial(work.turn, selector, version)
    generation = await begin(request, services, body, attempt, answer)
    return await respond(request, generation, writer, services.metrics.http, stream=body.stream)


class Work:
    """The work of one request: from its messages to answers that are kept where they are to be."""

    def __init__(
        self,
        services: Services,
        body: ChatRequest,
        tenant: str,
        planner: Planner,
        attempt: Attempt,
        writer: ChatWriter,
    ) -> None:
        self._services = services
        self._body = body
        self._tenant = tenant
        self._planner = planner
        self._attempt = attempt
        self._writer = writer

    async def alone(self, generation: Generation) -> None:
        """Answer without a conversation."""
        planner, body = self._planner, self._body
        prompt = planner.render(self._services.template)
        self._writer.expect(prompt)
        plans = await planner.plans(prompt)
        keep = self._keep if body.store or self._attempt.has_key else None
        await generate_choices(self._services, generation, self._tenant, plans, keep)

    async def _keep(self, outcomes: Sequence[Outcome]) -> None:
        """Keep the reply where it can be asked for again."""
        reply = whole_reply(self._writer.again(), outcomes)
        if self._body.store:
            await self._services.stored_chats.put(
                self._tenant, self._attempt.reply_id, self._body.metadata, reply, self._planner.inputs
            )
        if self._attempt.has_key:
            await self._attempt.keep(reply)

    async def turn(self, selector: ConversationSelector, version: int | None, generation: Generation) -> None:
        """Take the next turn of a conversation, which must be at `version` if that is given."""
        services, planner = self._services, self._planner
        queue_seconds = self._body.queue_ms / 1000
        async with services.turns.open(selector, if_match=version, queue_seconds=queue_seconds) as turn:
            await self._attempt.enter(turn.conversation.conversation_id)
            template = template_of(turn.conversation, services)
            base = await turn.base(planner.preamble(template))
            prompt = planner.render(template, base)
            self._writer.expect(prompt)
            plan = (await planner.plans(prompt))[0]
            forgets = prompt.opening.thinking and not self._body.keep_reasoning
            remembered = planner.without_thought(template, base, prompt) if forgets else None
            opening = Opening(template.past_opening) if forgets else prompt.opening
            content = planner.content_of(turn, prompt, opening, self._writer.call_ids[0])
            content = with_reply(content, self._attempt, self._writer.again, is_stored=self._body.store)
            async with self._stored(generation, turn):
                await generate_turn(services, generation, turn, plan, content, remembered)

    @contextlib.asynccontextmanager
    async def _stored(self, generation: Generation, turn: OpenTurn) -> AsyncGenerator[None]:
        """Let the turn be found as a stored completion, unless it certainly came to nothing."""
        if not self._body.store:
            yield
            return
        stored, reply_id = self._services.stored_chats, self._attempt.reply_id
        await stored.expect(self._tenant, reply_id, self._body.metadata, turn.conversation.conversation_id)
        try:
            yield
        except BaseException:
            if not generation.is_committing:
                with contextlib.suppress(LedgerError):  # then it leads nowhere until it expires
                    await asyncio.shield(stored.forget(self._tenant, reply_id))
            raise


def template_of(head: Conversation, services: Services) -> Template:
    """Return the template in which the conversation's borders are written."""
    if head.template == services.template.name:
        return services.template
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

    @cached_property
    def inputs(self) -> list[Item]:
        """The messages as items."""
        return [item for message in self._body.messages for item in _items(message)]

    def preamble(self, template: Template) -> str:
        """Return the system text that a history with these tools begins with; raises `TemplateError`."""
        toolbox = self._body.toolbox
        return "" if toolbox is None else tools_text(toolbox, template)

    def render(self, template: Template, base: Base | None = None) -> RenderedPrompt:
        """Return the messages, after what `base` has still to say, as the model was trained on them.

        Raises `TemplateError`.
        """
        toolbox = self._body.toolbox
        parts, first, num_known = self._parts(base)
        return render(
            parts,
            template,
            first=first,
            reasoning_effort=self._body.reasoning_effort,
            preamble=self.preamble(template) if first else "",
            must_call=toolbox is not None and toolbox.must_call,
            num_known=num_known,
        )

    def without_thought(self, template: Template, base: Base, prompt: RenderedPrompt) -> Remembered:
        """Return what says what is remembered in place of `prompt` and an answer with a thought."""
        parts, first, num_known = self._parts(base)
        preamble = self.preamble(template) if first else ""
        return without_thought(
            self._services, template, prompt, parts, first=first, preamble=preamble, num_known=num_known
        )

    def _parts(self, base: Base | None) -> tuple[list[Part], bool, int]:
        """Return what is to be rendered, whether it begins the history, and how much of it was said before."""
        before = [] if base is None else parts_of(base.items, base.answers)
        return [*before, *map(_message, self._body.messages)], base is None or base.num_tokens == 0, len(before)

    def content_of(
        self, turn: OpenTurn, prompt: RenderedPrompt, opening: Opening, call_id: str
    ) -> Callable[[Outcome], TurnContent]:
        """Return what makes a turn's content of the whole answer to `prompt`, remembered after `opening`.

        If no thought was opened there, none is remembered.
        """

        def content(outcome: Outcome) -> TurnContent:
            answer = read_answer(outcome.whole.text, prompt.opening, self._body.toolbox)
            if not opening.thinking:
                answer = msgspec.structs.replace(answer, reasoning="")
            ids, is_complete = AnswerIds(call=call_id), outcome.finished.reason is not FinishReason.LENGTH
            return TurnContent(
                items=[*self.inputs, *answered(answer, turn.answer_id, ids, is_complete=is_complete)],
                opening=opening.text,
                hint=opening.hint,
            )

        return content

    async def plans(self, prompt: RenderedPrompt) -> list[ChoicePlan]:
        """Return `n` choices of the prompt."""
        tokenizer = self._services.tokenizer
        prompt_ids, ends = await self._services.encode_pieces(prompt.pieces)
        stop = self._body.stop_rules(
            self._max_tokens, tokenizer.vocab_size, tokenizer.eos_token_ids, prompt.stop_strings
        )
        sampling = answering(self._sampling, prompt.opening, self._body.toolbox)
        return [
            ChoicePlan(
                index,
                prompt_ids,
                with_choice(sampling, index),
                stop,
                priority=self._body.priority,
                borders=borders_of(prompt, ends, is_stateful=self._body.is_stateful),
                keep_state=True,
                initial_state=self._initial_state,
            )
            for index in range(self._body.n)
        ]


def _items(message: schemas.Message) -> list[Item]:
    """Return what a message says, as items."""
    if message.tool_call_id is not None:
        return [returned(message.tool_call_id, message.text)]
    calls = [called(call.id, call.function.name, call.function.arguments) for call in message.tool_calls]
    return calls if calls and not message.text else [said(message.role, message.text), *calls]


def _message(message: schemas.Message) -> Message:
    calls = [ToolCall(call.function.name, call.function.arguments) for call in message.tool_calls]
    return Message(message.role, message.text, calls[0] if calls else None)
