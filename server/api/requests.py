"""What the two generating endpoints ask of a request before anything runs."""

from __future__ import annotations

import re

import msgspec
from fastapi import Request

from engine.messages import InitialStateRef, SamplingParams
from server.conversations.turns import ConversationSelector
from server.errors import BadRequest, UnknownModel
from server.schemas.generation import GenerationFields
from server.services import Services

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


def conversation_of(body: GenerationFields, services: Services) -> ConversationSelector | None:
    """Return which conversation the request continues: OpenAI's field wants it to exist, ours creates it."""
    initial_state = initial_state_of(body.initial_state, services)
    if body.conversation is not None:
        return ConversationSelector(body.conversation.id, create=False, initial_state=initial_state)
    if body.conversation_id is not None:
        return ConversationSelector(body.conversation_id, create=True, initial_state=initial_state)
    return None


def expected_version(request: Request, body: GenerationFields) -> int | None:
    """Return the version in `If-Match`, at which the conversation must be for the turn to run."""
    given = request.headers.get("if-match")
    if given is None:
        return None
    if not body.is_stateful:
        raise BadRequest("If-Match: only a turn of a conversation has a version to match.", "If-Match")
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
