"""Inputs of `kernels.wkv7`, and what the formulas make of them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from kernels import reference

NUM_SLOTS = 7


def starts_of(lengths: list[int]) -> torch.Tensor:
    """Return the packed offsets of `lengths`."""
    return torch.tensor([0, *lengths]).cumsum(0)


class WkvCase:
    """Random inputs of `wkv7` with decays as trained models have them."""

    def __init__(
        self,
        random: torch.Generator,
        num_tokens: int,
        v_first: bool,
        num_heads: int = 3,
        head_size: int = 16,
        device: torch.device | None = None,
    ) -> None:
        H, N, C = num_heads, head_size, num_heads * head_size

        def normal(*shape: int, scale: float = 1.0, mean: float = 0.0) -> torch.Tensor:
            return (torch.randn(*shape, generator=random) * scale + mean).to(device)

        self.num_heads, self.head_size = H, N
        self.r, self.k, self.v, self.gate = (normal(num_tokens, C) for _ in range(4))
        self.decay = normal(num_tokens, C, scale=2.0, mean=-3.0)
        self.a = torch.sigmoid(normal(num_tokens, C))
        self.v_first = normal(num_tokens, C) if v_first else None
        self.value_mix = torch.sigmoid(normal(num_tokens, C)) if v_first else None
        self.k_k, self.k_a = normal(C, scale=0.1, mean=0.7), normal(C, scale=0.1, mean=1.0)
        self.r_k = normal(H, N, scale=0.1)
        self.ln_weight, self.ln_bias = normal(C, scale=0.1, mean=1.0), normal(C, scale=0.1)
        # A strided view, as the pool hands out: another layer lies between two slots.
        self.state = normal(NUM_SLOTS, 2, H, N, N)[:, 1]

    def run(
        self,
        wkv7: Callable[..., torch.Tensor],
        tokens: slice,
        slots: torch.Tensor,
        lengths: list[int],
        **options: torch.Tensor,
    ) -> torch.Tensor:
        """Run an implementation of the operator on some of the tokens."""
        device = self.r.device
        return wkv7(
            *(None if t is None else t[tokens] for t in self._per_token),
            self.k_k,
            self.k_a,
            self.r_k,
            self.ln_weight,
            self.ln_bias,
            1e-5 * self.head_size,
            self.state,
            slots.to(device),
            starts_of(lengths).to(device),
            **options,
        )

    def only_decays(self) -> None:
        """Let tokens do nothing but multiply a float16 state of 1.5 by 1 - 2^-12: less than half a last place."""
        self.v.zero_()
        if self.v_first is not None:
            self.v_first.zero_()
        self.a.fill_(1e-20)
        self.decay.fill_(math.log(2**-12 / math.exp(-0.5)))  # of a sigmoid that is small
        self.state = torch.full_like(self.state, 1.5, dtype=torch.float16)

    @property
    def _per_token(self) -> tuple[torch.Tensor | None, ...]:
        return (self.r, self.k, self.v, self.decay, self.a, self.gate, self.v_first, self.value_mix)

    def expected(self, tokens: range, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (result, state) of one sequence by the formulas, in float64."""
        H, N = self.num_heads, self.head_size
        S = self.state[slot].double().clone()
        rows = []
        for t in tokens:
            r, k, v, dw, a, gate = (x[t].double() for x in (self.r, self.k, self.v, self.decay, self.a, self.gate))
            if self.v_first is not None and self.value_mix is not None:
                v = v + (self.v_first[t].double() - v) * self.value_mix[t].double()
            kk = reference.unit_length((k * self.k_k.double()).view(H, N))
            k = k * (1 + (a - 1) * self.k_a.double())
            w = torch.exp(-torch.exp(torch.tensor(-0.5, dtype=torch.float64)) * torch.sigmoid(dw))
            r, k, v, w, a = (x.view(H, N) for x in (r, k, v, w, a))
            y = torch.stack([reference.wkv_head(S[i], r[i], w[i], k[i], v[i], kk[i], a[i]) for i in range(H)])
            y = reference.group_norm(y, *(p.double().view(H, N) for p in (self.ln_weight, self.ln_bias)), 1e-5 * N)
            y = y + (r * k * self.r_k.double()).sum(1, keepdim=True) * v
            rows.append(y.reshape(H * N) * gate)
        return torch.stack(rows), S
