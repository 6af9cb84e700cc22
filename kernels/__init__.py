"""The operators of a recurrent language model: tensors in, tensors out, states advanced in place by slot.

Every operator is a `torch.library` operator in the namespace `sostenuto`, chosen by PyTorch's dispatcher: the plain
PyTorch implementation (`kernels.eager`) is registered for every device, and a faster twin for one device key replaces
it there. This package imports torch and nothing of ours. Dimension letters, layouts, dtypes and tolerances, and how to
add an operator: `kernels/README.md`.

Conventions shared by all operators that touch states:

- `T` tokens of `B` sequences lie packed, one sequence after the other; `starts[B + 1]` (int64) are the offsets,
  strictly rising, so no sequence is empty; `slots[B]` (int64) says which row of the pool each sequence owns. Slots of
  one call are unique, except that padding rows may share the scratch slot. A decode step is `T == B`.
- states are views of the pool, float32, those of `wkv7` also float16: contiguous inside a slot's layer, any stride
  from slot to slot.
"""

from __future__ import annotations

from typing import Literal

import torch

from kernels import cpu, eager
from kernels import triton as triton_operators

PYTORCH = "PyTorch"  # the backend that is always there

Activation = Literal["none", "tanh", "sigmoid"]

_library = torch.library.Library("sostenuto", "DEF")  # type: ignore[no-untyped-call]

_SCHEMAS = {
    "pack_linear": "(Tensor weight, bool int8=False) -> Tensor",
    "linear": "(Tensor x, Tensor weight, int out_features) -> Tensor",
    "low_rank": "(Tensor x, Tensor down, Tensor up, int rank, Tensor? bias, str activation, str output_activation, "
    "int out_features, ScalarType dtype) -> Tensor",
    "relu_squared": "(Tensor x) -> Tensor",
    "shift_mix": "(Tensor x, Tensor ln_weight, Tensor ln_bias, float eps, Tensor(a!) shift, Tensor mix, Tensor slots, "
    "Tensor starts, ScalarType dtype) -> Tensor",
    "wkv7": "(Tensor r, Tensor k, Tensor v, Tensor decay, Tensor a, Tensor gate, Tensor? v_first, Tensor? value_mix, "
    "Tensor k_k, Tensor k_a, Tensor r_k, Tensor ln_weight, Tensor ln_bias, float eps, Tensor(a!) state, Tensor slots, "
    "Tensor starts) -> Tensor",
    "sample": "(Tensor logits, Tensor rules) -> Tensor",
    "logprobs": "(Tensor logits, Tensor token_ids, int num_top, Tensor excluded_ids) -> (Tensor, Tensor, Tensor)",
}

for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema)  # type: ignore[no-untyped-call]
    # The alias key stands behind every device's own key: a backend that registers for CPU or CUDA wins there.
    _library.impl(_name, getattr(eager, _name), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]

_ops = torch.ops.sostenuto


def select_backend(device: torch.device, num_threads: int | None = None) -> str:
    """Register the fastest implementations that this machine has for `device`, and return their name.

    Called before weights are packed, by whoever owns the device: importing this package builds nothing. Compiled CPU
    operators have `num_threads` of their own, or as many as PyTorch started with; PyTorch's are then best left idle,
    for two teams on the same cores wait for each other.
    """
    if device.type == "cpu":
        return cpu.register(num_threads) or PYTORCH
    if device.type == "cuda":
        return triton_operators.register() or PYTORCH
    return PYTORCH


def is_fast_in_bfloat16(device: torch.device) -> bool:
    """Say whether what is registered for `device` is at least as fast with bfloat16 weights as with float32 ones."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return cpu.is_registered() or any(bool(capabilities.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16"))


class Linear:
    """A weight matrix `[out, in]`, packed once for the device it lies on; called with rows.

    `x[T, in] -> [T, out]` in `x`'s dtype; the product is computed in the weight's dtype with float32 accumulation.
    `int8`: the weights become integers with a scale for each output where the backend is faster so, and stay what they
    are elsewhere.
    """

    __slots__ = ("in_features", "out_features", "packed")

    def __init__(self, weight: torch.Tensor, int8: bool = False) -> None:
        self.out_features, self.in_features = weight.shape
        self.packed: torch.Tensor = _ops.pack_linear.default(weight, int8)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x @ weight.T`."""
        result: torch.Tensor = _ops.linear.default(x, self.packed, self.out_features)
        return result


class LowRank:
    """`output_activation(activation(x @ down.T) @ up.T + bias)`: how RWKV-7 computes decays, rates, mixes and gates.

    `down[D, C]`, `up[C, D]` (so official `w1`, `w2` transposed), `bias[C]` float32 or None. The products are computed
    in the weights' dtype, everything after them in float32; the result has `dtype`. Decays keep float32 weights and
    result, because 16 bits cannot tell a decay near 1 from 1.
    """

    __slots__ = ("activation", "bias", "down", "dtype", "out_features", "output_activation", "rank", "up")

    def __init__(
        self,
        down: torch.Tensor,
        up: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        activation: Activation = "none",
        output_activation: Activation = "none",
    ) -> None:
        self.out_features, self.rank = up.shape
        self.down: torch.Tensor = _ops.pack_linear.default(down)
        self.up: torch.Tensor = _ops.pack_linear.default(up)
        self.bias = bias
        self.dtype = dtype
        self.activation = activation
        self.output_activation = output_activation

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return `[T, C]` for `x[T, C]`."""
        result: torch.Tensor = _ops.low_rank.default(
            x,
            self.down,
            self.up,
            self.rank,
            self.bias,
            self.activation,
            self.output_activation,
            self.out_features,
            self.dtype,
        )
        return result


def relu_squared(x: torch.Tensor) -> torch.Tensor:
    """Return `max(x, 0) ** 2`, the activation of channel mixing."""
    result: torch.Tensor = _ops.relu_squared.default(x)
    return result


def shift_mix(
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
    """Layer norm, token shift and the mixes of a block in one: `out[m] = h + (previous h - h) * mix[m]`.

    `x[T, C]` float32 is the residual stream and `h = LayerNorm(x)`. The `h` before a sequence's first comes from its
    row of `shift[S, C]`, which afterwards holds the sequence's last `h`. `mix[M, C]`, `ln_weight[C]`, `ln_bias[C]` are
    float32. Returns `[M, T, C]` of `dtype`.
    """
    result: torch.Tensor = _ops.shift_mix.default(x, ln_weight, ln_bias, eps, shift, mix, slots, starts, dtype)
    return result


def wkv7(
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
    """RWKV-7's time mixing between its projections: the state's update and read-out, group norm, bonus and gate.

    `r, k, v, gate, a [T, C]` of one dtype, `a` after its sigmoid; `decay[T, C]` float32 is the raw `dw`
    (`w = exp(-exp(-0.5) * sigmoid(dw))`). `v_first` and `value_mix` `[T, C]` are given from the second layer on:
    `v` becomes `v + (v_first - v) * value_mix` first. `k_k[C]`, `k_a[C]`, `r_k[H, N]` and the group norm's
    `ln_weight[C]`, `ln_bias[C]` are float32. `state[S, H, N(value), N(key)]`, float32 or
    float16, is advanced in place; how float16 is rounded is in `kernels/README.md`. Returns `y * gate`, `[T, C]` of
    `gate`'s dtype; everything inside is float32.
    """
    result: torch.Tensor = _ops.wkv7.default(
        r,
        k,
        v,
        decay,
        a,
        gate,
        v_first,
        value_mix,
        k_k,
        k_a,
        r_k,
        ln_weight,
        ln_bias,
        eps,
        state,
        slots,
        starts,
    )
    return result


def sample(logits: torch.Tensor, rules: torch.Tensor) -> torch.Tensor:
    """Draw a token for each row of `logits[R, V]` float32.

    `rules[R, 5]` float64, in host memory and contiguous, has a row's temperature, top_k, top_p, min_p and uniform.
    Temperature 0 takes the most likely token, the lowest id among equals. Otherwise a token stays if it is among the
    `top_k` most likely (0: all), in the smallest set of most likely ones whose mass exceeds `top_p`, and at least
    `min_p` times as likely as the first; what stays is reshaped, `p ** (1 / temperature)`, and `uniform`, in [0, 1),
    picks from its cumulative distribution in the order of token ids. Returns `[R]` int64, on the device of `logits`.
    A row that is no distribution, having a NaN or plus infinity in it, gives -1; minus infinity is an impossible token.
    """
    result: torch.Tensor = _ops.sample.default(logits, rules)
    return result


def logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, num_top: int, excluded_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `[R]` log-probabilities of `token_ids[R]` under `logits[R, V]` float32, and the most likely alternatives.

    Those are `[R, K]` log-probabilities, falling, and `[R, K]` ids, with `K` the lesser of `num_top` and how many ids
    are not in `excluded_ids[E]`, which rise: those are no alternatives, but part of the distribution. Equal logits have
    equal log-probabilities, and of the most likely ones the lowest id comes first. All ids are int64. What is returned
    for a row with a NaN or plus infinity in it is not defined.
    """
    result: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = _ops.logprobs.default(
        logits, token_ids, num_top, excluded_ids
    )
    return result
