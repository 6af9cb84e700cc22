"""Layer norm, token shift and mixes in Triton."""

from __future__ import annotations

import pytest
import torch

from kernels import reference
from tests.kernels.wkv_case import starts_of

shift_mix = pytest.importorskip(
    "kernels.triton.shift_mix", reason="Triton is not installed: pip install sostenuto[cuda]"
)

C = 48
NUM_SLOTS = 7
SLOTS = torch.tensor([4, 0, 2, 5])


class ShiftCase:
    def __init__(self, random: torch.Generator, num_tokens: int, num_mixes: int, device: torch.device) -> None:
        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=random).to(device)

        self.x, self.mix = normal(num_tokens, C), normal(num_mixes, C)
        self.weight, self.bias = normal(C), normal(C)
        self.shift = normal(NUM_SLOTS, 2, C)[:, 1]

    def run(self, tokens: slice, slots: list[int], lengths: list[int]) -> torch.Tensor:
        device = self.x.device
        result: torch.Tensor = shift_mix.shift_mix(
            self.x[tokens],
            self.weight,
            self.bias,
            1e-5,
            self.shift,
            self.mix,
            torch.tensor(slots, device=device),
            starts_of(lengths).to(device),
            torch.float32,
        )
        return result

    def expected(self, slots: list[int], lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        out, shift = torch.empty(len(self.mix), len(self.x), C, dtype=torch.float64), self.shift.double().cpu().clone()
        norm = {"weight": self.weight.double().cpu(), "bias": self.bias.double().cpu()}
        t = 0
        for slot, length in zip(slots, lengths, strict=True):
            for _ in range(length):
                h = reference.layer_norm(self.x[t].double().cpu(), norm)
                out[:, t] = h + (shift[slot] - h) * self.mix.double().cpu()
                shift[slot] = h
                t += 1
        return out, shift


@pytest.mark.parametrize("tokens", [1, 8], ids=lambda tokens: f"{tokens} tokens a program")
@pytest.mark.parametrize("block", [16, 64], ids=["three programs a token", "one program a token"])
@pytest.mark.parametrize("lengths", [[1, 1, 1, 1], [19, 1, 9, 2]], ids=["step", "prompts"])
@pytest.mark.parametrize("num_mixes", [1, 6])
def test_mixes_equal_the_formulas(
    random: torch.Generator,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    block: int,
    tokens: int,
    lengths: list[int],
    num_mixes: int,
) -> None:
    """Each token meets the one before it in its own sequence, and the slot remembers the last."""
    monkeypatch.setattr(shift_mix, "block_for", lambda *_: block)
    monkeypatch.setattr(shift_mix, "tokens_for", lambda _: tokens)
    case = ShiftCase(random, sum(lengths), num_mixes, device)
    expected, expected_shift = case.expected(SLOTS.tolist(), lengths)
    result = case.run(slice(None), SLOTS.tolist(), lengths)
    torch.testing.assert_close(result.double().cpu(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(case.shift.double().cpu(), expected_shift, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lengths", [[1, 1, 1], [3, 2, 4]], ids=["step", "prompts"])
def test_a_padding_row_touches_nothing(random: torch.Generator, device: torch.device, lengths: list[int]) -> None:
    """A row with slot -1 leaves every state as it is, and its result is zero."""
    case = ShiftCase(random, sum(lengths), 6, device)
    before = case.shift.clone()
    result = case.run(slice(None), [3, -1, 6], lengths)
    untouched = [slot for slot in range(NUM_SLOTS) if slot not in (3, 6)]
    assert torch.equal(case.shift[untouched], before[untouched])
    assert not any(torch.equal(case.shift[slot], before[slot]) for slot in (3, 6))
    padding = result[:, lengths[0] : lengths[0] + lengths[1]]
    assert torch.equal(padding, torch.zeros_like(padding))
    assert not result.isnan().any()


def test_more_tokens_have_more_programs_then_longer_ones() -> None:
    """A program has a power of two of them, up to a bound."""
    tokens = [shift_mix.tokens_for(n) for n in (1, 127, 128, 255, 256, 512, 1000, 1024, 100_000)]
    assert tokens == [1, 1, 1, 1, 2, 4, 4, 8, 8]


@pytest.mark.parametrize("tokens", [1, 8], ids=lambda tokens: f"{tokens} tokens a program")
def test_a_token_does_not_depend_on_the_batch_or_on_cuts(
    random: torch.Generator, device: torch.device, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bitwise: a prompt at once, token by token, and beside another."""
    monkeypatch.setattr(shift_mix, "tokens_for", lambda _: tokens)
    case = ShiftCase(random, 23, 6, device)
    before = case.shift.clone()
    together = case.run(slice(0, 23), [1, 5], [20, 3])
    states = case.shift.clone()
    case.shift.copy_(before)
    alone = [case.run(slice(t, t + 1), [1 if t < 20 else 5], [1]) for t in range(23)]
    assert torch.equal(together, torch.cat(alone, dim=1))
    assert torch.equal(states, case.shift)
