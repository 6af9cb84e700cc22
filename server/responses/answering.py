"""The work of one request for a response: from its input to a committed turn."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, Iterator, Sequence
from functools import partial

import msgspec

from server.api.chat import template_of
from server.api.requests import answering, check_num_logprobs, grammar_named, limited
from server.conversations.ledger import Item, LedgerError
from server.conversations.open_turn import Base, OpenTurn, TurnContent
from server.errors import answer
from server.generation import (
    ChoicePlan,
    Delivered,
    Finished,
    Generation,
    borders_of,
    generate_alone,
    generate_turn,
    generate_untold,
)
from server.items import parts_of
from server.responses.draft import Draft
from server.responses.errors import ResponseCancelled
from server.responses.log import opened, predecessor_of
from server.responses.writer import ResponseWriter
from server.schemas.responses import ResponseRequest
from server.services import Services
from server.templates import RenderedPrompt, Template, TemplateError, render, tools_text


class Answering:
    """The work of one request: from its input to a committed response."""

    def __init__(self, services: Services, body: ResponseRequest, tenant: str) -> None:
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
        self.draft = Draft(body, services.model.name, services.tokenizer)
        self.writer = ResponseWriter(self.draft, services.tokenizer, queued=body.background)

    async def announce(self, status: str) -> None:
        """Let the response be found while it is generated; raises `LedgerUnavailable`."""
        response = self.draft.begun(status)
        async with self._services.presence.shown():  # or whoever finds it at once takes its server for dead
            await self._services.archive.note(self._tenant, self._log_id, response, self._inputs)

    async def withdraw(self) -> None:
        """Let a response that was announced not be found: its work is refused, and nobody has heard of it."""
        await self._services.archive.forget(self._tenant, self.draft.response_id)

    async def work(self, generation: Generation) -> None:
        """Generate, commit, and tell."""
        if not self._body.store:
            await self._answer(generation)
            return
        async with self._services.presence.shown(), self._ended_from_elsewhere(generation):
            try:
                await self._answer(generation)
            except BaseException as error:
                await asyncio.shield(self._note_failure(generation.interruption or error))
                raise

    @contextlib.asynccontextmanager
    async def _ended_from_elsewhere(self, generation: Generation) -> AsyncGenerator[None]:
        """Let other servers end a response in the background, which only this one could otherwise."""
        if not self._body.background:
            yield
            return
        asked = asyncio.create_task(self._services.archive.asked_to_end(self._tenant, self.draft.response_id))
        asked.add_done_callback(lambda task: None if task.cancelled() else generation.interrupt(ResponseCancelled()))
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
        with grammar_named(self._body):
            await self._generate(generation)

    async def _generate(self, generation: Generation) -> None:
        services, body = self._services, self._body
        predecessor = await predecessor_of(body, services.archive, self._tenant)
        if not body.store and predecessor is None and body.conversation is None:
            plan = await self._plan(self._render(services.template, None), is_stateful=False)
            whole, finished = await generate_alone(services, generation, self._tenant, plan)
            self._finish(generation, plan, whole, finished)
            return
        async with opened(services.turns, body, self._tenant, predecessor) as turn:
            self._log_id = turn.conversation.conversation_id
            if body.store:
                await self.announce("in_progress")
            template = template_of(turn.conversation, services)
            prompt = self._render(template, await turn.base(self._preamble(template)))
            plan = await self._plan(prompt, is_stateful=True)
            if body.store or body.conversation is not None:
                await generate_turn(services, generation, turn, plan, partial(self._content, turn, plan))
            else:  # the history stays as it is
                whole, finished = await generate_untold(services, generation, turn, plan)
                self._finish(generation, plan, whole, finished)

    def _finish(self, generation: Generation, plan: ChoicePlan, whole: Delivered, finished: Finished) -> None:
        """Tell of an answer that nobody remembers."""
        items = self.draft.items(whole, finished)
        self.writer.finish(self.draft.completed(items, whole, finished, len(plan.prompt_ids)))
        generation.emit(finished)

    def _preamble(self, template: Template) -> str:
        """Return the system text that a history with these instructions and tools begins with."""
        toolbox = self._body.toolbox
        tools = "" if toolbox is None else tools_text(toolbox, template)
        return "\n".join(filter(None, (self._body.instructions, tools)))

    def _render(self, template: Template, base: Base | None) -> RenderedPrompt:
        first = base is None or base.num_tokens == 0
        toolbox = self._body.toolbox
        before = [] if base is None else parts_of(base.items, base.answers)
        with _fields_named():
            self.draft.prompt = render(
                [*before, *parts_of(self._inputs, {})],
                template,
                first=first,
                reasoning_effort=self._body.reasoning.effort,
                preamble=self._preamble(template) if first else "",
                must_call=toolbox is not None and toolbox.must_call,
                num_known=len(before),
            )
        return self.draft.prompt

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

    def _content(self, turn: OpenTurn, plan: ChoicePlan, whole: Delivered, finished: Finished) -> TurnContent:
        """Return what the turn says, its reply in final form included."""
        items = self.draft.items(whole, finished, turn.answer_id)
        response = self.draft.completed(items, whole, finished, len(plan.prompt_ids))
        self.writer.finish(response)
        assert self.draft.prompt is not None, "rendered before it was answered"
        return TurnContent(
            items=[*self._inputs, *items],
            opening=self.draft.prompt.opening.text,
            hint=self.draft.prompt.opening.hint,
            reply_id=response.id if self._body.store else "",
            reply=msgspec.json.encode(response) if self._body.store else b"",
        )

    async def _note_failure(self, error: BaseException) -> None:
        """Say of a response that will not come why it will not; if even that fails, its server's death will say it."""
        if not self._log_id and not self._body.background:
            return  # refused before it began: nobody knows its id
        if isinstance(error, ResponseCancelled | asyncio.CancelledError):
            response = self.draft.begun("cancelled")
        else:
            told = answer(error if isinstance(error, Exception) else RuntimeError())
            response = self.draft.failed(told.code, told.body.error.message)
        with contextlib.suppress(LedgerError):
            await self._services.archive.note(self._tenant, self._log_id, response, self._inputs)


@contextlib.contextmanager
def _fields_named() -> Iterator[None]:
    """Let a template's complaints name the fields of this API, which calls two of them otherwise than chat."""
    try:
        yield
    except TemplateError as error:
        field = re.sub(r"^messages", "input", error.field).replace("reasoning_effort", "reasoning.effort")
        raise TemplateError(field, str(error)) from None
