"""The work of one request for a response: from its input to a committed turn."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, Iterator, Sequence
from functools import partial

import msgspec

from server.api.chat import template_of
from server.api.requests import Remembered, answering, check_num_logprobs, limited, without_thought
from server.conversations.ledger import Item, LedgerError
from server.conversations.open_turn import Base, OpenTurn, TurnContent
from server.errors import answer
from server.generation import (
    ChoicePlan,
    Generation,
    Outcome,
    borders_of,
    generate_alone,
    generate_turn,
    generate_untold,
)
from server.idempotency import Attempt, bounded
from server.items import new_id, parts_of
from server.responses.draft import Draft
from server.responses.errors import ResponseCancelled
from server.responses.log import opened, predecessor_of
from server.responses.writer import ResponseWriter
from server.schemas.responses import Response, ResponseRequest
from server.services import Services
from server.templates import Opening, Part, RenderedPrompt, Template, TemplateError, render, tools_text


class Answering:
    """The work of one request: from its input to a committed response."""

    def __init__(self, services: Services, body: ResponseRequest, tenant: str) -> None:
        """Raises `BadRequest`."""
        self._services = services
        self._body = body
        self._tenant = tenant
        self._max_tokens = limited(
            "max_output_tokens",
            body.max_output_tokens,
            services.settings.max_output_tokens,
            services.settings.max_output_tokens,
        )
        num_logprobs = check_num_logprobs("top_logprobs", body.num_logprobs, services)
        self._sampling = body.sampling(services.tokenizer.vocab_size, num_logprobs)
        self._inputs: Sequence[Item] = [item.item() for item in body.input]
        self._log_id = ""
        self.attempt_as(Attempt(new_id("resp")))

    def attempt_as(self, attempt: Attempt) -> None:
        """Let the response have the id of the attempt's reply; said before anything else is done."""
        self._attempt = attempt
        self.draft = Draft(self._body, self._services.model.name, self._services.tokenizer, attempt.reply_id)
        self.writer = ResponseWriter(self.draft, self._services.tokenizer, queued=self._body.background)

    async def announce(self, status: str) -> None:
        """Let the response be found while it is generated; raises `LedgerUnavailable`."""
        response = self.draft.begun(status)
        async with self._services.presence.shown():  # or whoever finds it at once takes its server for dead
            await self._note(response)

    async def _note(self, response: Response) -> None:
        """Note how the response stands, beside its log.

        What was said in a conversation is in its log alone, so that it goes when the conversation is deleted.
        """
        inputs = self._inputs
        if self._body.conversation is not None:
            response, inputs = msgspec.structs.replace(response, instructions=None), []
        await self._services.archive.note(self._tenant, self._log_id, response, inputs)

    async def withdraw(self) -> None:
        """Let a response that was announced not be found: its work is refused, and nobody has heard of it."""
        await self._services.archive.forget(self._tenant, self.draft.response_id)

    async def work(self, generation: Generation) -> None:
        """Generate, commit, and tell."""
        if not self._body.store:
            await self._answer(generation)
            return
        try:
            async with self._services.presence.shown(), self._ended_from_elsewhere(generation):
                try:
                    await self._answer(generation)
                except BaseException as error:
                    await asyncio.shield(self._note_failure(generation.interruption or error))
                    raise
        finally:
            self._services.archive.ended(self._tenant, self.draft.response_id)

    @contextlib.asynccontextmanager
    async def _ended_from_elsewhere(self, generation: Generation) -> AsyncGenerator[None]:
        """Let other servers end a response in the background, which only this one could otherwise."""
        if not self._body.background or not self._services.turns.ledger.is_shared:
            yield
            return
        asked = asyncio.create_task(self._services.archive.asked_to_end(self._tenant, self.draft.response_id))

        def interrupt(task: asyncio.Task[None]) -> None:
            if not task.cancelled():
                task.result()
                generation.interrupt(ResponseCancelled())

        asked.add_done_callback(interrupt)
        try:
            yield
        finally:
            asked.cancel()

    async def count(self) -> int:
        """Return how many tokens the model would read; what asks nothing after a history is that history alone."""
        services = self._services
        predecessor = await predecessor_of(self._body, services.archive, self._tenant)
        if predecessor is None and self._body.conversation is None:
            return await self._count_after(None, services.template)
        async with opened(services.turns, self._body, self._tenant, predecessor) as turn:
            template = template_of(turn.conversation, services)
            return await self._count_after(await turn.base(self._preamble(template)), template)

    async def _count_after(self, base: Base | None, template: Template) -> int:
        num_history = 0 if base is None else base.num_tokens
        if not self._inputs and (base is None or not base.items):
            return num_history
        prompt = self._render(template, base)
        return num_history + len((await self._services.encode_pieces(prompt.pieces))[0])

    # -- the steps ----------------------------------------------------------------------------------------------------

    async def _answer(self, generation: Generation) -> None:
        services, body = self._services, self._body
        predecessor = await predecessor_of(body, services.archive, self._tenant)
        if not body.store and predecessor is None and body.conversation is None:
            plan = await self._plan(self._render(services.template, None), is_stateful=False)
            await self._finish(generation, await generate_alone(services, generation, self._tenant, plan))
            return
        async with opened(services.turns, body, self._tenant, predecessor) as turn:
            self._log_id = turn.conversation.conversation_id
            if body.is_remembered:
                await self._attempt.enter(self._log_id)
            if body.store:
                await self.announce("in_progress")
            template = template_of(turn.conversation, services)
            base = await turn.base(self._preamble(template))
            prompt = self._render(template, base)
            plan = await self._plan(prompt, is_stateful=True)
            if body.is_remembered:
                forgets = prompt.opening.thinking and not body.keep_reasoning
                remembered = self._without_thought(template, base, prompt) if forgets else None
                opening = Opening(template.past_opening) if forgets else prompt.opening
                content = partial(self._content, turn, opening)
                await generate_turn(services, generation, turn, plan, content, remembered)
            else:  # the history stays as it is
                await self._finish(generation, await generate_untold(services, generation, turn, plan))

    async def _finish(self, generation: Generation, outcome: Outcome) -> None:
        """Tell of an answer that no conversation remembers."""
        response = self.draft.completed(self.draft.items(outcome), outcome)
        self.writer.finish(response)
        if self._attempt.has_key:
            await self._attempt.keep(msgspec.json.encode(response))
        generation.emit(outcome.finished)

    def _preamble(self, template: Template) -> str:
        """Return the system text that a history with these instructions and tools begins with."""
        toolbox = self._body.toolbox
        tools = "" if toolbox is None else tools_text(toolbox, template)
        return "\n".join(filter(None, (self._body.instructions, tools)))

    def _render(self, template: Template, base: Base | None) -> RenderedPrompt:
        toolbox = self._body.toolbox
        parts, first, num_known = self._parts(base)
        with _fields_named():
            self.draft.prompt = render(
                parts,
                template,
                first=first,
                reasoning_effort=self._body.reasoning.effort,
                preamble=self._preamble(template) if first else "",
                must_call=toolbox is not None and toolbox.must_call,
                num_known=num_known,
            )
        return self.draft.prompt

    def _without_thought(self, template: Template, base: Base, prompt: RenderedPrompt) -> Remembered:
        parts, first, num_known = self._parts(base)
        preamble = self._preamble(template) if first else ""
        return without_thought(
            self._services, template, prompt, parts, first=first, preamble=preamble, num_known=num_known
        )

    def _parts(self, base: Base | None) -> tuple[list[Part], bool, int]:
        """Return what is to be rendered, whether it begins the history, and how much of it was said before."""
        before = [] if base is None else parts_of(base.items, base.answers)
        return [*before, *parts_of(self._inputs, {})], base is None or base.num_tokens == 0, len(before)

    async def _plan(self, prompt: RenderedPrompt, *, is_stateful: bool) -> ChoicePlan:
        tokenizer = self._services.tokenizer
        prompt_ids, ends = await self._services.encode_pieces(prompt.pieces)
        stop = self._body.stop_rules(
            self._max_tokens, tokenizer.vocab_size, tokenizer.eos_token_ids, prompt.stop_strings
        )
        sampling = answering(self._sampling, prompt.opening, self._body.toolbox)
        return ChoicePlan(
            0,
            prompt_ids,
            sampling,
            stop,
            priority=self._body.priority,
            borders=borders_of(prompt, ends, is_stateful=is_stateful),
            keep_state=True,
        )

    def _content(self, turn: OpenTurn, opening: Opening, outcome: Outcome) -> TurnContent:
        """Return what the turn says, remembered after `opening`, its reply in final form included."""
        items = self.draft.items(outcome, turn.answer_id)
        response = self.draft.completed(items, outcome)
        self.writer.finish(response)
        is_kept = self._body.store or self._attempt.has_key
        reply = msgspec.json.encode(response) if is_kept else b""
        if not opening.thinking:
            items = [item for item in items if item.item_id != self.draft.ids.thought]
        return TurnContent(
            items=[*self._inputs, *items],
            opening=opening.text,
            hint=opening.hint,
            reply_id=response.id if is_kept else "",
            reply=reply if self._body.store else bounded(reply),
        )

    async def _note_failure(self, error: BaseException) -> None:
        """Say of a response that will not come why it will not; if even that fails, it is found as failed untold."""
        if isinstance(error, ResponseCancelled | asyncio.CancelledError):
            response = self.draft.begun("cancelled")
        else:
            told = answer(error if isinstance(error, Exception) else RuntimeError())
            response = self.draft.failed(told.code, told.body.error.message)
        archive = self._services.archive
        with contextlib.suppress(LedgerError):
            if await archive.is_noted(self._tenant, response.id):  # else nobody knows it, or somebody has deleted it
                await self._note(response)


@contextlib.contextmanager
def _fields_named() -> Iterator[None]:
    """Let a template's complaints name the fields of this API, which calls two of them otherwise than chat."""
    try:
        yield
    except TemplateError as error:
        field = re.sub(r"^messages", "input", error.field).replace("reasoning_effort", "reasoning.effort")
        raise TemplateError(field, str(error)) from None
