"""Penalties: whose tokens count, and how."""

from __future__ import annotations

import pytest
import torch

from engine.messages import SamplingParams
from engine.runner.penalties import PenaltyCounters

V = 6


@pytest.fixture
def counters() -> PenaltyCounters:
    """Counters for three slots."""
    return PenaltyCounters(3)


def penalised(counters: PenaltyCounters, slot: int, params: SamplingParams) -> list[float]:
    """Return a row of logits [2, -2, 2, -2, ...] after the penalties."""
    logits = torch.tensor([[2.0, -2.0] * (V // 2)])
    counters.apply(logits, [slot], [params])
    return [round(value, 5) for value in logits[0].tolist()]


def test_repetition_weakens_everything_the_request_consumed(counters: PenaltyCounters) -> None:
    """Positive logits are divided, negative ones multiplied, once, however often the token came."""
    counters.consume(1, [0, 1, 1, 0])
    params = SamplingParams(seed=0, repetition_penalty=2.0)
    assert penalised(counters, 1, params) == [1.0, -4.0, 2.0, -2.0, 2.0, -2.0]
    counters.consume(1, [2])
    assert penalised(counters, 1, params) == [1.0, -4.0, 1.0, -2.0, 2.0, -2.0]
    assert penalised(counters, 0, params) == [2.0, -2.0] * 3


def test_presence_and_frequency_look_at_generated_tokens_only(counters: PenaltyCounters) -> None:
    """Prompt tokens do not count; presence is paid once, frequency for each time."""
    params = SamplingParams(seed=0, presence_penalty=0.5, frequency_penalty=0.25)
    counters.consume(0, [0, 1, 2])
    for token_id in (4, 4, 5):
        counters.generate([0], [token_id], [params])
    assert penalised(counters, 0, params) == [2.0, -2.0, 2.0, -2.0, 1.0, -2.75]


def test_counts_decay_with_each_generated_token(counters: PenaltyCounters) -> None:
    """RWKV's rule: all counts are multiplied by the decay, then the new token's grows by one."""
    params = SamplingParams(seed=0, frequency_penalty=1.0, penalty_decay=0.5)
    for token_id in (0, 2, 0):
        counters.generate([0], [token_id], [params])
    # token 0: ((1 * 0.5) * 0.5) + 1, token 2: 1 * 0.5
    assert penalised(counters, 0, params) == [0.75, -2.0, 1.5, -2.0, 2.0, -2.0]


def test_a_negative_penalty_favours(counters: PenaltyCounters) -> None:
    """Penalties may be negative, as in the OpenAI interface."""
    params = SamplingParams(seed=0, presence_penalty=-1.0)
    counters.generate([0], [1], [params])
    assert penalised(counters, 0, params)[1] == -1.0


def test_rows_with_and_without_penalties_mix(counters: PenaltyCounters) -> None:
    """Only the rows that ask are changed, each by its own slot's tokens."""
    plain = SamplingParams(seed=0)
    penalty = SamplingParams(seed=0, presence_penalty=1.0)
    repetition = SamplingParams(seed=0, repetition_penalty=2.0)
    counters.consume(2, [0])
    counters.generate([0, 1, 2], [3, 3, 3], [plain, penalty, repetition])
    logits = torch.ones(3, V)
    counters.apply(logits, [2, 0, 1], [repetition, plain, penalty])
    assert logits.tolist() == [[0.5, 1, 1, 1, 1, 1], [1] * 6, [1, 1, 1, 0, 1, 1]]


def test_a_reset_slot_knows_nothing_of_its_last_owner(counters: PenaltyCounters) -> None:
    """No request is penalised for another's tokens, and other slots keep theirs."""
    params = SamplingParams(seed=0, presence_penalty=1.0, repetition_penalty=2.0)
    for slot in (0, 1):
        counters.consume(slot, [0])
        penalised(counters, slot, params)
        counters.generate([slot], [2], [params])
    counters.reset(0)
    assert penalised(counters, 0, params) == [2.0, -2.0] * 3
    assert penalised(counters, 1, params) == [1.0, -2.0, 1.0, -2.0, 2.0, -2.0]


def test_counts_of_many_tokens_follow_the_rule_over_a_whole_vocabulary() -> None:
    """What is held sparsely equals counts held for every token of the vocabulary."""
    counters, random = PenaltyCounters(1), torch.Generator().manual_seed(3)
    params = SamplingParams(seed=0, presence_penalty=0.3, frequency_penalty=0.7, penalty_decay=0.97)
    dense = torch.zeros(50)
    for token_id in torch.randint(50, (300,), generator=random).tolist():
        counters.generate([0], [token_id], [params])
        dense *= 0.97
        dense[token_id] += 1
    logits = torch.randn(1, 50, generator=random)
    expected = logits - (0.3 * (dense > 0) + 0.7 * dense)
    counters.apply(logits, [0], [params])
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("decay", [1.0, 0.996, 0.5])
def test_counting_at_once_equals_counting_as_they_came(decay: float) -> None:
    """Bit for bit, whatever was generated, so that a conversation does not depend on where it was interrupted."""
    params = SamplingParams(seed=0, presence_penalty=0.3, frequency_penalty=0.7, penalty_decay=decay)
    token_ids = [(n * n) % 11 for n in range(500)]
    logits = torch.linspace(-3, 3, 2 * 11).reshape(2, 11)
    for border in (0, 1, 250, 499, 500):
        counters = PenaltyCounters(2)
        for token_id in token_ids:
            counters.generate([0], [token_id], [params])
        counters.count(1, token_ids[:border], params)
        for token_id in token_ids[border:]:
            counters.generate([1], [token_id], [params])
        rows = logits[:1].repeat(2, 1)
        counters.apply(rows, [0, 1], [params, params])
        assert torch.equal(rows[0], rows[1])
        assert not torch.equal(rows[0], logits[0])


def test_repetition_counts_what_was_generated_before(counters: PenaltyCounters) -> None:
    """As if the request had consumed it; a slot that is reset forgets it."""
    params = SamplingParams(seed=0, repetition_penalty=2.0)
    counters.count(1, [0, 1], params)
    counters.consume(1, [2])
    assert penalised(counters, 1, params) == [1.0, -4.0, 1.0, -2.0, 2.0, -2.0]
    counters.reset(1)
    assert penalised(counters, 1, params) == [2.0, -2.0] * 3
