"""The operators of `kernels` on the compiled library. What it does not handle goes on to `kernels.eager`.

Packed weights are flat: one dimension. So whoever meets them knows which implementation made them, and models packed
by either can live side by side.
"""

from __future__ import annotations

from ctypes import byref

import torch

from kernels import eager
from kernels.cpu import library
from kernels.cpu.library import ACTIVATIONS, FORMATS, WEIGHT_FORMATS, Matrix, Rows, Team
from kernels.cpu.memory import Slabs


class Operators:
    """The operators, bound to one team of threads. The methods' contracts are those of `kernels`' functions."""

    def __init__(self, team: Team) -> None:
        self.team = team
        self.enabled = True
        self._slabs = Slabs()

    def pack_linear(self, weight: torch.Tensor, int8: bool = False) -> torch.Tensor:
        """See `kernels.Linear`."""
        if not self.enabled or weight.dtype not in FORMATS:
            return eager.pack_linear(weight, int8)
        rows, dtype = _readable(weight), torch.int8 if int8 else weight.dtype
        matrix = Matrix(None, *weight.shape, WEIGHT_FORMATS[dtype])
        num_bytes = self.team.library.sostenuto_packed_bytes(*weight.shape, matrix.format)
        packed = self._slabs.take(num_bytes).view(dtype)
        matrix.data = packed.data_ptr()
        self.team.library.sostenuto_pack(self.team.handle, byref(library.rows(rows)), byref(matrix))
        return packed

    def linear(self, x: torch.Tensor, weight: torch.Tensor, out_features: int) -> torch.Tensor:
        """See `kernels.Linear`."""
        if not is_packed_here(weight):
            return eager.linear(x, weight, out_features)
        rows = _readable(x)
        y = rows.new_empty(len(x), out_features)
        matrix = as_matrix(weight, out_features, x.shape[1])
        self.team.library.sostenuto_linear(
            self.team.handle, len(x), byref(library.rows(rows)), byref(matrix), byref(library.rows(y))
        )
        return y.to(x.dtype)

    def low_rank(
        self,
        x: torch.Tensor,
        down: torch.Tensor,
        up: torch.Tensor,
        rank: int,
        bias: torch.Tensor | None,
        activation: str,
        output_activation: str,
        out_features: int,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """See `kernels.LowRank`."""
        if not is_packed_here(down):
            return eager.low_rank(x, down, up, rank, bias, activation, output_activation, out_features, dtype)
        rows = _readable(x)
        y = rows.new_empty(len(x), out_features, dtype=dtype if dtype in FORMATS else torch.float32)
        weights = library.LowRank(
            as_matrix(down, rank, x.shape[1]),
            as_matrix(up, out_features, rank),
            None if bias is None else library.floats(bias),
            ACTIVATIONS[activation],
            ACTIVATIONS[output_activation],
        )
        self.team.library.sostenuto_apply_low_rank(
            self.team.handle, len(x), byref(library.rows(rows)), byref(weights), byref(library.rows(y))
        )
        return y.to(dtype)

    def relu_squared(self, x: torch.Tensor) -> torch.Tensor:
        """See `kernels.relu_squared`."""
        if not self.enabled or x.dtype not in FORMATS or x.dim() != 2:
            return eager.relu_squared(x)
        x = _readable(x)
        y = torch.empty_like(x)
        self.team.library.sostenuto_relu_squared(
            self.team.handle, *x.shape, byref(library.rows(x)), byref(library.rows(y))
        )
        return y

    def shift_mix(
        self,
        x: torch.Tensor,
        ln_weight: torch.Tensor,
        ln_bias: torch.Tensor,
        eps: float,
        shift: torch.Tensor,
        mix: torch.Tensor,
        slots: torch.Tensor,
        starts: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """See `kernels.shift_mix`."""
        if not self.enabled or x.dtype not in FORMATS or dtype not in FORMATS:
            return eager.shift_mix(x, ln_weight, ln_bias, eps, shift, mix, slots, starts, dtype)
        x = _readable(x)
        out = x.new_empty(len(mix), *x.shape, dtype=dtype)
        self.team.library.sostenuto_shift_mix(
            self.team.handle,
            byref(library.batch(slots, starts, len(x))),
            byref(library.rows(x)),
            x.shape[1],
            byref(library.norm(ln_weight, ln_bias, eps)),
            byref(library.states(shift)),
            library.floats(mix),
            len(mix),
            (Rows * len(mix))(*map(library.rows, out)),
        )
        return out

    def wkv7(
        self,
        r: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        decay: torch.Tensor,
        a: torch.Tensor,
        gate: torch.Tensor,
        v_first: torch.Tensor | None,
        value_mix: torch.Tensor | None,
        k_k: torch.Tensor,
        k_a: torch.Tensor,
        r_k: torch.Tensor,
        ln_weight: torch.Tensor,
        ln_bias: torch.Tensor,
        eps: float,
        state: torch.Tensor,
        slots: torch.Tensor,
        starts: torch.Tensor,
    ) -> torch.Tensor:
        """See `kernels.wkv7`."""
        per_token = (r, k, v, decay, a, gate, v_first, value_mix)
        known = all(tensor is None or tensor.dtype in FORMATS for tensor in per_token)
        if not self.enabled or not known or r_k.shape[1] > self.team.max_head_size:
            return eager.wkv7(*per_token, k_k, k_a, r_k, ln_weight, ln_bias, eps, state, slots, starts)
        rows = [None if tensor is None else _readable(tensor) for tensor in per_token]
        y = gate.new_empty(gate.shape)
        parameters = library.Wkv7Parameters(
            *r_k.shape,
            library.floats(k_k),
            library.floats(k_a),
            library.floats(r_k),
            library.norm(ln_weight, ln_bias, eps),
        )
        self.team.library.sostenuto_wkv7(
            self.team.handle,
            byref(library.batch(slots, starts, len(r))),
            byref(parameters),
            byref(library.Wkv7Rows(*map(library.rows, [*rows, y]))),
            byref(library.states(state)),
        )
        return y

    def sample(self, logits: torch.Tensor, rules: torch.Tensor) -> torch.Tensor:
        """See `kernels.sample`."""
        if not self.enabled or logits.dtype != torch.float32:
            return eager.sample(logits, rules)
        logits = _readable(logits)
        num_rows, vocab_size = logits.shape
        token_ids = torch.empty(num_rows, dtype=torch.int64)
        sampling = library.Sampling(
            num_rows,
            vocab_size,
            logits.stride(0),
            logits.data_ptr(),
            library.sampling_rules(rules, num_rows),
            token_ids.data_ptr(),
        )
        self.team.library.sostenuto_sample(self.team.handle, byref(sampling))
        return token_ids

    def logprobs(
        self, logits: torch.Tensor, token_ids: torch.Tensor, num_top: int, excluded_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `kernels.logprobs`."""
        if not self.enabled or logits.dtype != torch.float32:
            return eager.logprobs(logits, token_ids, num_top, excluded_ids)
        logits, token_ids, excluded_ids = _readable(logits), token_ids.contiguous(), excluded_ids.contiguous()
        num_rows, vocab_size = logits.shape
        num_top = min(num_top, vocab_size - len(excluded_ids))
        own, top = torch.empty(num_rows), torch.empty(num_rows, num_top)
        top_ids = torch.empty(num_rows, num_top, dtype=torch.int64)
        asked = library.Logprobs(
            num_rows,
            vocab_size,
            logits.stride(0),
            logits.data_ptr(),
            token_ids.data_ptr(),
            num_top,
            len(excluded_ids),
            excluded_ids.data_ptr(),
            own.data_ptr(),
            top.data_ptr(),
            top_ids.data_ptr(),
        )
        self.team.library.sostenuto_report_logprobs(self.team.handle, byref(asked))
        return own, top, top_ids


def as_matrix(packed: torch.Tensor, out_features: int, in_features: int) -> Matrix:
    """Return packed weights as the library sees them."""
    return Matrix(packed.data_ptr(), out_features, in_features, WEIGHT_FORMATS[packed.dtype])


def is_packed_here(packed: torch.Tensor) -> bool:
    """Say whether `pack_linear` of this module made `packed`."""
    return packed.dim() == 1


def _readable(x: torch.Tensor) -> torch.Tensor:
    """Return `x[T, C]` in a dtype that the library reads, with contiguous rows."""
    known = x if x.dtype in FORMATS else x.float()
    return known if known.stride(1) == 1 else known.contiguous()
