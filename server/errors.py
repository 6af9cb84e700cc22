"""What can go wrong for a client, and the one table that says how each error is answered.

ServerError
├── BadRequest               the request asks for something impossible or unsupported; names the field
├── Unauthorized             no key, or not this one
├── UnknownModel             the model is not the one being served
├── HeadTooLarge             the address and the headers have more bytes than anybody needs
├── BodyTooLarge             more bytes than the operator allows; said while they arrive
├── BodyTooSlow              the body did not arrive in time
├── RateLimitExceeded        the key has used up what it may ask for
├── ChatCompletionNotFound   no chat completion of that id is stored
├── IdempotencyInProgress    a request with this Idempotency-Key is being carried out
├── IdempotencyKeyReused     this Idempotency-Key was used for another body
├── ReplyNotKept             the request was carried out, and its reply was too large to be kept
└── ServerDraining           the server is shutting down; what had not finished was not applied

Errors of the engine and of conversations keep their own trees; all meet in `ANSWERS`. An answer never repeats what the
client sent, and never tells about our insides.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from engine import errors as engine
from server import templates
from server.conversations import edits, ledger, open_turn, portable, transfers
from server.responses import errors as responses


class ServerError(Exception):
    """Base of the HTTP layer's own errors."""


class BadRequest(ServerError):
    """The request cannot be served as it stands. `param` names the field at fault, if it is one field's."""

    def __init__(self, message: str, param: str | None = None, code: str = "invalid_value") -> None:
        self.param = param
        self.code = code
        super().__init__(message)


class Unauthorized(ServerError):
    """The request carries no API key, or a wrong one."""


class UnknownModel(ServerError):
    """The request names a model that is not served."""


class HeadTooLarge(ServerError):
    """The address and the headers have more bytes than anybody needs."""


class BodyTooLarge(ServerError):
    """The body has more bytes than the operator allows."""


class BodyTooSlow(ServerError):
    """The body did not arrive in time."""


class RateLimitExceeded(ServerError):
    """The tenant has used up its `resource` (requests, tokens, or requests that run at once)."""

    def __init__(self, resource: str, retry_after_seconds: float) -> None:
        self.resource = resource
        self.retry_after_seconds = retry_after_seconds
        super().__init__(f"This API key has used up its {resource}.")


class ChatCompletionNotFound(ServerError):
    """No chat completion of that id is stored."""


class IdempotencyInProgress(ServerError):
    """A request with this key is being carried out; its reply will have the id `reply_id`."""

    def __init__(self, reply_id: str) -> None:
        self.reply_id = reply_id
        super().__init__("a request with this Idempotency-Key is being carried out")


class IdempotencyKeyReused(ServerError):
    """The key was used for a request with another body."""


class ReplyNotKept(ServerError):
    """The request with this key was carried out, but its reply was too large to be kept."""


class ServerDraining(ServerError):
    """The server is shutting down."""


class ErrorDetail(msgspec.Struct, frozen=True):
    """What OpenAI's clients read. All four keys are always there."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True):
    """The body of every error, also inside a stream."""

    error: ErrorDetail


@dataclass(frozen=True, slots=True)
class Answer:
    """How an error is told to a client."""

    status: int
    body: ErrorBody
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def code(self) -> str:
        """The error's code: the label under which it is counted."""
        return self.body.error.code or "unknown"

    def render(self) -> bytes:
        """Return the body as JSON."""
        return msgspec.json.encode(self.body)


RETRY_SOON_SECONDS = 1.0
RETRY_ELSEWHERE_SECONDS = 5.0  # a draining server is replaced, not resumed
# OpenAI's clients try again by themselves after these and every 5xx, unless they are told not to.
RETRIED_STATUSES = frozenset({408, 409, 429})


@dataclass(frozen=True, slots=True)
class Rule:
    """How errors of one type are answered. Without `message` the error's own text is told."""

    status: int
    type: str
    code: str
    message: str | None = None
    param: str | None = None
    retry_after_seconds: float | None = None  # None: the same request would meet the same answer
    closes_connection: bool = False
    refine: Callable[[Exception, Answer], Answer] | None = None


def _with_field(error: Exception, answer: Answer) -> Answer:
    assert isinstance(error, BadRequest)
    detail = msgspec.structs.replace(answer.body.error, param=error.param, code=error.code)
    return Answer(answer.status, ErrorBody(detail), answer.headers)


def _with_engine_field(error: Exception, answer: Answer) -> Answer:
    assert isinstance(error, engine.InvalidRequest)
    name = error.field.rpartition(".")[2]
    detail = msgspec.structs.replace(answer.body.error, param=ENGINE_FIELDS.get(name, name))
    return Answer(answer.status, ErrorBody(detail), answer.headers)


def _with_template_field(error: Exception, answer: Answer) -> Answer:
    assert isinstance(error, templates.TemplateError)
    detail = msgspec.structs.replace(answer.body.error, param=error.field)
    return Answer(answer.status, ErrorBody(detail), answer.headers)


def _with_wait(error: Exception, answer: Answer) -> Answer:
    assert isinstance(error, ledger.ConversationBusy | RateLimitExceeded)
    return Answer(answer.status, answer.body, {**answer.headers, **_retry_after(error.retry_after_seconds)})


def _retry_after(seconds: float) -> dict[str, str]:
    milliseconds = max(1, math.ceil(seconds * 1000))
    return {"retry-after": str(math.ceil(milliseconds / 1000)), "retry-after-ms": str(milliseconds)}


def _with_version(error: Exception, answer: Answer) -> Answer:
    assert isinstance(error, ledger.VersionConflict)
    detail = msgspec.structs.replace(answer.body.error, message=f"The conversation is at version {error.version}.")
    return Answer(answer.status, ErrorBody(detail), {**answer.headers, "etag": f'"{error.version}"'})


# What the engine calls a field, where clients know it by another name.
ENGINE_FIELDS = {
    "prompt_ids": "prompt",
    "stop_strings": "stop",
    "num_logprobs": "logprobs",
    "num_prompt_logprobs": "logprobs",
}

REQUEST, AUTH, CONFLICT, LIMIT, SERVER, OVERLOAD = (
    "invalid_request_error",
    "authentication_error",
    "conflict_error",
    "rate_limit_error",
    "server_error",
    "overloaded_error",
)

CORRUPT = Rule(
    500,
    SERVER,
    "state_corrupt",
    "The conversation's log is damaged; nothing was generated from it.",
    "conversation",
)

ANSWERS: dict[type[Exception], Rule] = {
    BadRequest: Rule(400, REQUEST, "invalid_value", refine=_with_field),
    engine.InvalidRequest: Rule(400, REQUEST, "invalid_value", refine=_with_engine_field),
    templates.TemplateError: Rule(400, REQUEST, "invalid_value", refine=_with_template_field),
    Unauthorized: Rule(401, AUTH, "invalid_api_key", "Send the server's API key as a bearer token."),
    responses.ResponseCancelled: Rule(409, CONFLICT, "response_cancelled", "The response was cancelled."),
    responses.ResponseNotFound: Rule(404, REQUEST, "response_not_found", "There is no such response.", "response_id"),
    responses.PreviousResponseNotFound: Rule(
        404, REQUEST, "previous_response_not_found", "There is no such response.", "previous_response_id"
    ),
    responses.PreviousResponseUnfinished: Rule(
        400, REQUEST, "previous_response_unfinished", "That response has no answer to continue.", "previous_response_id"
    ),
    ChatCompletionNotFound: Rule(
        404, REQUEST, "completion_not_found", "There is no such stored completion.", "completion_id"
    ),
    UnknownModel: Rule(404, REQUEST, "model_not_found", "This server has no such model.", "model"),
    ledger.ConversationNotFound: Rule(
        404, REQUEST, "conversation_not_found", "There is no such conversation.", "conversation"
    ),
    ledger.DocumentNotFound: Rule(400, REQUEST, "invalid_value", "after: there is no such entry in the list.", "after"),
    portable.FileRejected: Rule(400, REQUEST, "invalid_export"),
    transfers.StateRejected: Rule(
        400,
        REQUEST,
        "invalid_state",
        "Nothing was imported: the state in the file is not the one after its log. Try without_state=true.",
    ),
    transfers.StoreNotShared: Rule(
        400,
        REQUEST,
        "state_not_portable",
        "This server keeps its states in memory: they can be neither exported nor imported.",
        "include_state",
    ),
    ledger.ConversationExpired: Rule(
        410, REQUEST, "conversation_expired", "The conversation was deleted or has expired.", "conversation"
    ),
    BodyTooSlow: Rule(
        408,
        REQUEST,
        "body_timeout",
        "The request's body did not arrive in time.",
        None,
        RETRY_SOON_SECONDS,
        closes_connection=True,
    ),
    BodyTooLarge: Rule(413, REQUEST, "body_too_large", "The request's body is too large."),
    HeadTooLarge: Rule(431, REQUEST, "head_too_large", "The request's address and headers are too large."),
    ledger.ConversationExists: Rule(409, CONFLICT, "conversation_exists", "This id is taken.", "conversation"),
    ledger.ConversationBusy: Rule(
        409,
        CONFLICT,
        "conversation_locked",
        "Another turn of this conversation is in progress.",
        "conversation",
        RETRY_SOON_SECONDS,
        refine=_with_wait,
    ),
    ledger.LeaseLost: Rule(
        409,
        CONFLICT,
        "ownership_lost",
        "Another server took over this conversation; the turn was not applied.",
        "conversation",
        RETRY_SOON_SECONDS,
    ),
    open_turn.VersionUnknown: Rule(
        404, REQUEST, "version_not_found", "The conversation has no such version.", "version"
    ),
    edits.ItemNotFound: Rule(404, REQUEST, "item_not_found", "The conversation has no such item.", "item_id"),
    open_turn.ModelMismatch: Rule(
        409, CONFLICT, "model_mismatch", "This conversation was held with another model.", "conversation"
    ),
    engine.InitialStateUnavailable: Rule(
        409,
        CONFLICT,
        "initial_state_mismatch",
        "This server does not have the initial state that this history began from, or its name has another content.",
        "initial_state",
    ),
    open_turn.InitialStateConflict: Rule(
        409,
        CONFLICT,
        "initial_state_conflict",
        "The conversation did not begin from this initial state, and what it began from is fixed.",
        "initial_state",
    ),
    ledger.VersionConflict: Rule(412, CONFLICT, "version_mismatch", None, "conversation", refine=_with_version),
    IdempotencyInProgress: Rule(
        409,
        CONFLICT,
        "idempotency_in_progress",
        "A request with this Idempotency-Key is being carried out.",
        "Idempotency-Key",
        RETRY_SOON_SECONDS,
    ),
    IdempotencyKeyReused: Rule(
        422,
        REQUEST,
        "idempotency_key_reused",
        "This Idempotency-Key belongs to a request with another body.",
        "Idempotency-Key",
    ),
    ReplyNotKept: Rule(
        409,
        CONFLICT,
        "idempotency_reply_too_large",
        "The request was carried out before; its reply was too large to be kept.",
        "Idempotency-Key",
    ),
    RateLimitExceeded: Rule(429, LIMIT, "rate_limit_exceeded", None, None, RETRY_SOON_SECONDS, refine=_with_wait),
    open_turn.LogCorrupt: CORRUPT,
    ledger.LedgerCorrupt: CORRUPT,
    engine.NumericalError: Rule(
        500, SERVER, "numerical_error", "The model produced a value that is not a number; nothing was applied."
    ),
    engine.StateUnavailable: Rule(
        503, OVERLOAD, "state_unavailable", "The conversation's state cannot be had now.", None, RETRY_SOON_SECONDS
    ),
    engine.CheckpointError: Rule(
        503, OVERLOAD, "store_unavailable", "The state store does not answer.", None, RETRY_SOON_SECONDS
    ),
    ledger.LedgerUnavailable: Rule(
        503, OVERLOAD, "store_unavailable", "The conversation store does not answer.", None, RETRY_SOON_SECONDS
    ),
    engine.QueueFull: Rule(503, OVERLOAD, "queue_full", "Too many requests wait.", None, RETRY_SOON_SECONDS),
    engine.EngineDied: Rule(
        503,
        OVERLOAD,
        "engine_restarted",
        "The engine failed; what had not finished was not applied.",
        None,
        RETRY_SOON_SECONDS,
    ),
    engine.EngineDraining: Rule(
        503, OVERLOAD, "server_draining", "The server is shutting down.", None, RETRY_ELSEWHERE_SECONDS
    ),
    ServerDraining: Rule(
        503,
        OVERLOAD,
        "server_draining",
        "The server is shutting down; what had not finished was not applied.",
        None,
        RETRY_ELSEWHERE_SECONDS,
    ),
    engine.EngineError: Rule(
        500,
        SERVER,
        "engine_error",
        "The engine failed on this request; nothing was applied.",
        None,
        RETRY_SOON_SECONDS,
    ),
    Exception: Rule(500, SERVER, "internal_error", "The server failed to answer; nothing was applied."),
}


def answer(error: Exception) -> Answer:
    """Return how to tell a client about `error`, by the most specific rule that covers it."""
    rule = next(ANSWERS[kind] for kind in type(error).__mro__ if kind in ANSWERS)
    headers = {}
    if rule.status in RETRIED_STATUSES or rule.status >= 500:
        headers["x-should-retry"] = "false" if rule.retry_after_seconds is None else "true"
    if rule.retry_after_seconds is not None:
        headers |= _retry_after(rule.retry_after_seconds)
    if rule.closes_connection:
        headers["connection"] = "close"
    detail = ErrorDetail(rule.message or str(error), rule.type, rule.param, rule.code)
    plain = Answer(rule.status, ErrorBody(detail), headers)
    return plain if rule.refine is None else rule.refine(error, plain)


def answer_status(status: int) -> Answer:
    """Return the answer to a request that the router itself refuses: no such path, or not with this method."""
    code, message = {
        404: ("not_found", "There is nothing at this address."),
        405: ("method_not_allowed", "This address does not take this method."),
    }.get(status, ("bad_request", "The request cannot be served."))
    return Answer(status, ErrorBody(ErrorDetail(message, REQUEST, None, code)))


def is_our_fault(error: Exception) -> bool:
    """Say whether nobody expected `error`: it is a defect, to be logged with its traceback."""
    return next(kind for kind in type(error).__mro__ if kind in ANSWERS) is Exception
