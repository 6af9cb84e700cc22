"""Thousands of tokens with the decays of trained models: rounding must not grow with the length of a history."""

from __future__ import annotations

import pytest
import torch

import kernels
from kernels import reference

H, N, C, T = 2, 16, 32, 2500

pytestmark = pytest.mark.usefixtures("poisoned_memory", "implementation")


def test_float32_states_follow_float64_over_thousands_of_steps() -> None:
    """With decays in (0.545, 1), many so close to 1 that the state remembers thousands of tokens, errors stay small."""
    random = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    r, k, v, gate = (normal(T, C) for _ in range(4))
    decay, a = normal(T, C) * 0.5 + torch.linspace(-9, 2, C), torch.sigmoid(normal(T, C))
    w = torch.exp(-torch.exp(torch.tensor(-0.5)) * torch.sigmoid(decay))
    assert w.min() < 0.6
    assert w.max() > 0.9999
    ones, zeros, state = torch.ones(C), torch.zeros(C), torch.zeros(1, H, N, N)
    y = kernels.wkv7(
        *(r, k, v, decay, a, gate, None, None),
        *(ones, ones, torch.zeros(H, N), ones, zeros, 1e-5 * N),
        *(state, torch.tensor([0]), torch.tensor([0, T])),
    )
    expected_y, S = _scan_in_float64(r, k, v, decay, a, gate)
    assert (state[0] - S).abs().max() <= 1e-5 * S.abs().max()
    assert (y - expected_y).abs().max() <= 1e-4 * expected_y.abs().max()


def _scan_in_float64(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    r, k, v, decay, a, gate = (tensor.double() for tensor in inputs)
    w = torch.exp(-torch.exp(torch.tensor(-0.5, dtype=torch.float64)) * torch.sigmoid(decay))
    S = torch.zeros(H, N, N, dtype=torch.float64)
    y = torch.empty(T, H, N, dtype=torch.float64)
    for t in range(T):
        kk = reference.unit_length(k[t].view(H, N))
        row = [x[t].view(H, N) for x in (r, w, k * a, v)]  # with k_a = 1 the key becomes k * a
        for h in range(H):
            y[t, h] = reference.wkv_head(S[h], *(x[h] for x in row), kk[h], a[t].view(H, N)[h])
    ones = torch.ones(H, N, dtype=torch.float64)
    normed = torch.stack([reference.group_norm(y[t], ones, 0 * ones, 1e-5 * N) for t in range(T)])
    return normed.view(T, C) * gate, S
