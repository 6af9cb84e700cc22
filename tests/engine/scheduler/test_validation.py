from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from engine.errors import InvalidRequest
from engine.messages import CheckpointRef, GenerationRequest, SamplingParams, StateSource, StopRules
from engine.scheduler.validation import MAX_STOP_STRING_BYTES, validate
from engine.token_chain import extend_digest, root_digest

ROOT = root_digest()
VOCAB_SIZE = 100
MAX_LOGPROBS = 5
HISTORY = [1, 2, 3]
CHAIN = extend_digest(ROOT, HISTORY)

VALID = GenerationRequest(
    request_id="a",
    prompt_ids=[0, VOCAB_SIZE - 1],
    sampling=SamplingParams(
        seed=2**64 - 1,
        temperature=0.0,
        top_p=1.0,
        min_p=1.0,
        presence_penalty=-2.0,
        repetition_penalty=0.5,
        penalty_decay=1.0,
        logit_bias={99: -100.0},
        num_logprobs=MAX_LOGPROBS,
    ),
    stop=StopRules(max_tokens=0, stop_token_ids=(99,), stop_strings=(b"x" * MAX_STOP_STRING_BYTES,)),
    source=StateSource(num_tokens=0, chain=ROOT),
    num_prompt_logprobs=0,
)


def with_part(part: str, **changes: Any) -> GenerationRequest:
    """Return the valid request with changes to one of its parts."""
    return msgspec.structs.replace(VALID, **{part: msgspec.structs.replace(getattr(VALID, part), **changes)})


def refused_field(request: GenerationRequest) -> str:
    """Return the field that `request` is refused for; its message begins with it."""
    with pytest.raises(InvalidRequest) as caught:
        validate(request, VOCAB_SIZE, MAX_LOGPROBS)
    assert str(caught.value).startswith(caught.value.field)
    return caught.value.field


@pytest.mark.parametrize(
    "source",
    [
        StateSource(num_tokens=0, chain=ROOT),
        StateSource(num_tokens=3, chain=CHAIN),
        StateSource(num_tokens=3, chain=CHAIN, replay_ids=HISTORY),
        StateSource(num_tokens=3, chain=CHAIN, checkpoint=CheckpointRef(checkpoint_id="c", num_tokens=3, chain=CHAIN)),
        StateSource(
            num_tokens=3,
            chain=CHAIN,
            checkpoint=CheckpointRef(checkpoint_id="c", num_tokens=1, chain=extend_digest(ROOT, [1])),
            replay_ids=[2, 3],
        ),
    ],
)
def test_values_at_their_limits_are_accepted(source: StateSource) -> None:
    """Every way to name a state, and every limit exactly reached."""
    validate(msgspec.structs.replace(VALID, source=source), VOCAB_SIZE, MAX_LOGPROBS)


@pytest.mark.parametrize("prompt_ids", [[], [VOCAB_SIZE], [-1], [5, 10**9]])
def test_a_prompt_must_have_tokens_and_only_real_ones(prompt_ids: list[int]) -> None:
    """Nothing that the embedding does not have."""
    assert refused_field(msgspec.structs.replace(VALID, prompt_ids=prompt_ids)) == "prompt_ids"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", -1),
        ("seed", 2**64),
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("top_k", -1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("presence_penalty", math.inf),
        ("frequency_penalty", math.nan),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("penalty_decay", 0.0),
        ("penalty_decay", 1.1),
        ("logit_bias", {VOCAB_SIZE: 1.0}),
        ("logit_bias", {1: math.nan}),
        ("num_logprobs", MAX_LOGPROBS + 1),
        ("num_logprobs", -1),
    ],
)
def test_sampling_out_of_range_is_refused(field: str, value: object) -> None:
    """By name, so that nothing can break the batch it would have been in."""
    assert refused_field(with_part("sampling", **{field: value})) == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", -1),
        ("stop_token_ids", (VOCAB_SIZE,)),
        ("stop_strings", (b"ok", b"")),
        ("stop_strings", (b"x" * MAX_STOP_STRING_BYTES, b"x")),
    ],
)
def test_stop_rules_out_of_range_are_refused(field: str, value: object) -> None:
    """An empty stop string is everywhere; a huge one is an attack."""
    assert refused_field(with_part("stop", **{field: value})) == field


def test_prompt_log_probabilities_have_the_same_limit() -> None:
    """As those of sampled tokens."""
    too_many = msgspec.structs.replace(VALID, num_prompt_logprobs=MAX_LOGPROBS + 1)
    assert refused_field(too_many) == "num_prompt_logprobs"


@pytest.mark.parametrize(
    "source",
    [
        StateSource(num_tokens=-1, chain=ROOT),
        StateSource(num_tokens=3, chain=b"short"),
        StateSource(num_tokens=3, chain=CHAIN, replay_ids=[1, 2]),
        StateSource(num_tokens=3, chain=CHAIN, replay_ids=[1, 2, VOCAB_SIZE]),
        StateSource(num_tokens=3, chain=CHAIN, checkpoint=CheckpointRef(checkpoint_id="c", num_tokens=2, chain=CHAIN)),
        StateSource(
            num_tokens=4,
            chain=CHAIN,
            checkpoint=CheckpointRef(checkpoint_id="c", num_tokens=3, chain=CHAIN),
            replay_ids=[9],
        ),
        StateSource(num_tokens=3, chain=CHAIN, checkpoint=CheckpointRef(checkpoint_id="c", num_tokens=3, chain=ROOT)),
    ],
)
def test_tokens_that_could_not_give_the_state_are_refused(source: StateSource) -> None:
    """A replay is checked against the chain before it costs anything."""
    assert refused_field(msgspec.structs.replace(VALID, source=source)) == "source"
