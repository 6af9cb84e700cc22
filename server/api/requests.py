"""What the two generating endpoints ask of a request before anything runs."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Awaitable, Callable, Iterator, Sequence

import msgspec
from fastapi import Request

from engine.errors import InvalidRequest
from engine.messages import Grammar, InitialStateRef, SamplingParams
from server.conversations.history import scoped
from server.conversations.open_turn import TurnContent
from server.conversations.turns import ConversationSelector
from server.errors import BadRequest, UnknownModel
from server.generation import Generation, Outcome
from server.idempotency import Attempt, bounded
from server.schemas.generation import GenerationFields, SamplingFields
from server.services import Services
from server.streaming import ReplyWriter, whole_reply
from server.templates import (
    END_OF_THOUGHT,
    Opening,
    Part,
    RenderedPrompt,
    Template,
    Toolbox,
    call_grammar,
    read_answer,
    render_remembered,
)
from server.tenants import budget_of

ENTITY_TAG = re.compile(r'"?(\d{1,9})"?')


def check_model(name: str | None, services: Services) -> None:
    """Raise `UnknownModel` unless `name` is the model being served, or absent."""
    if name not in (None, services.model.name):
        raise UnknownModel


def initial_state_of(name: str | None, services: Services) -> InitialStateRef | None:
    """Return the tuned state of that name; raises `BadRequest`, which lists what there is."""
    if name is None:
        return None
    known = {ref.name: ref for ref in services.model.engine.initial_states}
    if name not in known:
        there_is = f"it has {', '.join(sorted(known))}" if known else "it has none"
        raise BadRequest(f"initial_state: this server has no such state; {there_is}.", "initial_state")
    return known[name]


def conversation_of(body: GenerationFields, services: Services, tenant: str) -> ConversationSelector | None:
    """Return which conversation the request continues: OpenAI's field wants it to exist, ours creates it."""
    initial_state = initial_state_of(body.initial_state, services)
    if body.conversation is not None:
        name = scoped(tenant, body.conversation.id)
        return ConversationSelector(name, create=False, initial_state=initial_state)
    if body.conversation_id is not None:
        name = scoped(tenant, body.conversation_id)
        return ConversationSelector(name, create=True, initial_state=initial_state)
    return None


def expected_version(request: Request, body: GenerationFields) -> int | None:
    """Return the version in `If-Match`, at which the conversation must be for the turn to run."""
    version = version_in_header(request)
    if version is not None and not body.is_stateful:
        raise BadRequest("If-Match: only a turn of a conversation has a version to match.", "If-Match")
    return version


def version_in_header(request: Request) -> int | None:
    """Return the version in `If-Match`, if there is one; raises `BadRequest`."""
    given = request.headers.get("if-match")
    if given is None:
        return None
    if (matched := ENTITY_TAG.fullmatch(given.strip())) is None:
        raise BadRequest("If-Match: must be the number of a version.", "If-Match")
    return int(matched[1])


def limited(name: str, value: int | None, default: int, limit: int) -> int:
    """Return `value`, or `default` without one but never above `limit`; raises `BadRequest` for a value above it."""
    if value is None:
        return min(default, limit)
    if value > limit:
        raise BadRequest(f"{name}: this server allows at most {limit}.", name)
    return value


def check_num_logprobs(name: str, value: int | None, services: Services) -> int | None:
    """Return `value`; raises `BadRequest` if the operator allows fewer."""
    return None if value is None else limited(name, value, 0, services.settings.max_logprobs)


def with_choice(sampling: SamplingParams, choice_idx: int) -> SamplingParams:
    """Return the sampling of one of `n` choices: the first as asked, each other with the next seed."""
    return msgspec.structs.replace(sampling, seed=(sampling.seed + choice_idx) % 2**64)


def answering(sampling: SamplingParams, opening: Opening, toolbox: Toolbox | None = None) -> SamplingParams:
    """Return the sampling of an answer that begins with `opening`: its grammar is of what a reader will see.

    Calls of tools have a grammar of their own, where they need one; raises `BadRequest` if the request has another.
    """
    grammar = sampling.grammar
    if toolbox is not None and (calls := call_grammar(toolbox)) is not None:
        if grammar is not None:
            raise BadRequest("tools: an answer that may be a strict call cannot have another form.", "tools")
        grammar = Grammar(kind="lark", text=calls)
    if grammar is None:
        return sampling
    after, lead = (END_OF_THOUGHT, r"\s*") if opening.thinking else ("", opening.unshown)
    return msgspec.structs.replace(sampling, grammar=msgspec.structs.replace(grammar, after=after, lead=lead))


Remembered = Callable[[str], Awaitable[tuple[list[int], list[int]]]]


def without_thought(
    services: Services,
    template: Template,
    prompt: RenderedPrompt,
    parts: Sequence[Part],
    *,
    first: bool,
    preamble: str,
    num_known: int,
) -> Remembered:
    """Return what says of the answer to `prompt` what is remembered without its thought; the rest is as in `render`."""

    async def remembered(text: str) -> tuple[list[int], list[int]]:
        answer = read_answer(text, prompt.opening).content  # a call is told apart later, from the same text
        pieces, written = render_remembered(
            parts, template, answer, first=first, preamble=preamble, num_known=num_known
        )
        prompt_ids, _ = await services.encode_pieces(pieces)
        return prompt_ids, await services.encode(written) if written else []

    return remembered


async def begin(
    request: Request,
    services: Services,
    body: SamplingFields,
    attempt: Attempt,
    work: Callable[[Generation], Awaitable[None]],
) -> Generation:
    """Begin the work of a request, which is what the attempt is made for; raises `RateLimitExceeded`."""

    async def attempted(generation: Generation) -> None:
        async with attempt:
            with grammar_named(body):
                await work(generation)

    try:
        return Generation(services.drain, budget_of(request), attempted, outlives_reader=body.outlives_reader)
    except BaseException:
        await attempt.release()
        raise


def with_reply(
    content_of: Callable[[Outcome], TurnContent],
    attempt: Attempt,
    new_writer: Callable[[], ReplyWriter],
    *,
    is_stored: bool = False,
) -> Callable[[Outcome], TurnContent]:
    """Return `content_of` with the whole reply as a part of the turn, if somebody may ask for it again."""
    if not (attempt.has_key or is_stored):
        return content_of

    def content(outcome: Outcome) -> TurnContent:
        reply = whole_reply(new_writer(), [outcome])
        kept = reply if is_stored else bounded(reply)
        return dataclasses.replace(content_of(outcome), reply_id=attempt.reply_id, reply=kept)

    return content


@contextlib.contextmanager
def grammar_named(body: SamplingFields) -> Iterator[None]:
    """Let the engine's complaints about a grammar name the field that brought it."""
    try:
        yield
    except InvalidRequest as error:
        if error.field != "grammar":
            raise
        name = next(iter(body.asked_grammars), "tools")
        raise BadRequest(f"{name}: {str(error).removeprefix('grammar ')}.", name) from None
