"""One table from exceptions to answers: complete, specific, and silent about our insides."""

from __future__ import annotations

from collections.abc import Iterator

import orjson
import pytest

from engine import errors as engine
from server import errors
from server.conversations import ledger, open_turn
from server.responses import errors as response_errors
from server.templates import TemplateError

SECRET = "pr1vate"


def subclasses(kind: type[Exception]) -> Iterator[type[Exception]]:
    """Yield every class below `kind` in its tree."""
    for subclass in kind.__subclasses__():
        yield subclass
        yield from subclasses(subclass)


# Raised while a server starts, never by a request.
AT_START = {engine.ModelFileError, engine.TokenizerError}


TREES = (ledger.LedgerError, open_turn.TurnError, response_errors.ResponseError, engine.EngineError, errors.ServerError)
KINDS: set[type[Exception]] = {kind for tree in TREES for kind in subclasses(tree)} - AT_START


@pytest.mark.parametrize("kind", sorted(KINDS, key=str))
def test_every_error_has_a_rule_of_its_own(kind: type[Exception]) -> None:
    """Nothing that is foreseen is answered as unforeseen."""
    rule = next(errors.ANSWERS[base] for base in kind.__mro__ if base in errors.ANSWERS)
    assert rule is not errors.ANSWERS[Exception]


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (errors.BadRequest("temperature: too hot.", "temperature"), 400, "invalid_value"),
        (engine.InvalidRequest("prompt_ids", "has a token id outside [0, 256)"), 400, "invalid_value"),
        (TemplateError("messages", "there is no message to answer"), 400, "invalid_value"),
        (errors.Unauthorized(), 401, "invalid_api_key"),
        (errors.UnknownModel(), 404, "model_not_found"),
        (ledger.ConversationNotFound(SECRET), 404, "conversation_not_found"),
        (ledger.ConversationExpired(SECRET), 410, "conversation_expired"),
        (ledger.ConversationExists(SECRET), 409, "conversation_exists"),
        (ledger.ConversationBusy(SECRET, 2.5), 409, "conversation_locked"),
        (ledger.LeaseLost(SECRET), 409, "ownership_lost"),
        (open_turn.ModelMismatch(SECRET), 409, "model_mismatch"),
        (ledger.VersionConflict(SECRET, 3, 5), 412, "version_mismatch"),
        (errors.HeadTooLarge(), 431, "head_too_large"),
        (errors.BodyTooLarge(), 413, "body_too_large"),
        (errors.BodyTooSlow(), 408, "body_timeout"),
        (errors.RateLimitExceeded("requests per minute", 2.5), 429, "rate_limit_exceeded"),
        (open_turn.LogCorrupt(SECRET), 500, "state_corrupt"),
        (engine.NumericalError(SECRET), 500, "numerical_error"),
        (engine.EngineError(SECRET), 500, "engine_error"),
        (engine.QueueFull(SECRET), 503, "queue_full"),
        (engine.EngineDraining(SECRET), 503, "server_draining"),
        (engine.EngineDied(SECRET), 503, "engine_restarted"),
        (engine.StoreUnavailable(SECRET), 503, "store_unavailable"),
        (ledger.LedgerUnavailable(SECRET), 503, "store_unavailable"),
        (errors.ServerDraining(), 503, "server_draining"),
        (ValueError(SECRET), 500, "internal_error"),
        (KeyError(SECRET), 500, "internal_error"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_errors_are_answered(error: Exception, status: int, code: str) -> None:
    """Status and code, all four keys, a way back for whoever may retry, and no word of ours."""
    told = errors.answer(error)
    assert (told.status, told.code) == (status, code)
    body = orjson.loads(told.render())
    assert list(body) == ["error"]
    assert sorted(body["error"]) == ["code", "message", "param", "type"]
    assert SECRET not in str(body)
    if status in (429, 503):
        assert int(told.headers["retry-after"]) > 0
        assert int(told.headers["retry-after-ms"]) > 0
    # OpenAI's clients would try these again by themselves: they are told whether it can help.
    if status in (408, 409, 429) or status >= 500:
        assert told.headers["x-should-retry"] == ("true" if "retry-after" in told.headers else "false")
    else:
        assert "x-should-retry" not in told.headers


def test_a_busy_conversation_says_for_how_long() -> None:
    """Retry-After is a whole number of seconds, rounded up; clients that can read milliseconds get those."""
    assert errors.answer(ledger.ConversationBusy("c", 2.5)).headers["retry-after"] == "3"
    assert errors.answer(ledger.ConversationBusy("c", 2.5)).headers["retry-after-ms"] == "2500"
    assert errors.answer(ledger.ConversationBusy("c", 0.0)).headers["retry-after"] == "1"


@pytest.mark.parametrize(
    "error",
    [
        ledger.ConversationExists(SECRET),
        open_turn.ModelMismatch(SECRET),
        open_turn.LogCorrupt(SECRET),
        engine.NumericalError(SECRET),
        ValueError(SECRET),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_client_is_told_not_to_retry_in_vain(error: Exception) -> None:
    """The same request would meet the same answer."""
    assert errors.answer(error).headers["x-should-retry"] == "false"


def test_a_version_conflict_tells_the_version() -> None:
    """In words and as an entity tag."""
    told = errors.answer(ledger.VersionConflict("c", 3, 5))
    assert told.headers["etag"] == '"5"'
    assert "5" in told.body.error.message


def test_the_engines_fields_are_told_in_the_clients_words() -> None:
    """`prompt_ids` is `prompt`, `stop.stop_strings` is `stop`."""
    for ours, theirs in (("prompt_ids", "prompt"), ("stop.stop_strings", "stop"), ("sampling.top_p", "top_p")):
        assert errors.answer(engine.InvalidRequest(ours, "is wrong")).body.error.param == theirs


def test_only_the_unforeseen_is_our_fault() -> None:
    """Those are logged with their traceback."""
    assert errors.is_our_fault(ValueError())
    assert not errors.is_our_fault(errors.BadRequest("x"))
    assert not errors.is_our_fault(engine.EngineDied("x"))
