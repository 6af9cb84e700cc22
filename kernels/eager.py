"""The operators in plain PyTorch, for every device PyTorch knows.

These are the implementations that other backends replace: correct everywhere, fast enough to serve, no build step.
Shapes and contracts are those of `kernels`; the mathematics with its sources is in `kernels.reference`.

What this path costs: the states of the sequences in a tile are copied out of the pool, advanced in place, and copied
back, because PyTorch cannot run a batched product on rows that lie scattered. A tile is bounded (`TILE_BYTES`), so
nothing the size of all states is ever allocated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

TILE_BYTES = {"cpu": 2 << 20, "cuda": 64 << 20}  # of state copied out at once: a CPU tile stays in its cache

_HEAD = 256  # most likely tokens looked at before a whole row is sorted: nearly always enough for top_p

_LOG_DECAY_BOUND = -math.exp(-0.5)  # RWKV-7: log w = -exp(-0.5) * sigmoid(dw), so w lies in (0.545, 1)
_COLUMN_HASH, _ROW_HASH = 0x9E3779B1 - 2**32, 0x85EBCA6B - 2**32  # of 32 bits, as int32 has them
_LOST_BITS = (1 << 13) - 1  # of a float32, that a float16 of its size does not have


def _sigmoid(x: torch.Tensor) -> torch.Tensor:
    """As `torch.sigmoid`, which rounds the last elements of a tensor differently from all others."""
    return x.neg().exp_().add_(1).reciprocal_()


_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda x: x,
    "tanh": torch.tanh,
    "sigmoid": _sigmoid,
}


def pack_linear(weight: torch.Tensor, int8: bool = False) -> torch.Tensor:
    """Return `weight` in the layout that `linear` reads fastest. PyTorch gains nothing from int8: it is left as it is.

    On CPU that is oneDNN's blocked layout: two to three times faster, and unlike `F.linear` its result for a row does
    not depend on how many rows there are. The operators are PyTorch's own but private, hence the way back.
    """
    if weight.device.type == "cpu" and _onednn_packs(weight.dtype):
        packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
        return packed
    return weight.contiguous()


def _onednn_packs(dtype: torch.dtype) -> bool:
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):  # type: ignore[no-untyped-call]
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def linear(x: torch.Tensor, weight: torch.Tensor, out_features: int) -> torch.Tensor:
    """See `kernels.Linear`.

    On CPU a 16-bit product is rounded to 16 bits before it becomes float32: PyTorch has no mixed product there.
    """
    if x.is_cuda and x.dtype == torch.float32 != weight.dtype:
        return torch.mm(x.to(weight.dtype), weight.t(), out_dtype=torch.float32)
    return _matmul(x.to(weight.dtype), weight).to(x.dtype)


def _matmul(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if weight.is_mkldnn:
        if len(x) == 1 and x.dtype == torch.float32:
            # oneDNN sums a lone float32 row over long inputs in another order; of two rows each is as in any batch
            return _matmul(x.expand(2, -1), weight)[:1]
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, None, "none", [], "")
        return result
    return nn.functional.linear(x, weight)


def low_rank(
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
    hidden = _ACTIVATIONS[activation](_matmul(x.to(down.dtype), down))
    out = _matmul(hidden.to(up.dtype), up).float()
    if bias is not None:
        out += bias
    return _ACTIVATIONS[output_activation](out).to(dtype)


def relu_squared(x: torch.Tensor) -> torch.Tensor:
    """See `kernels.relu_squared`."""
    return torch.relu(x).square_()


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
    """See `kernels.shift_mix`."""
    h = nn.functional.layer_norm(x.float(), (x.shape[1],), ln_weight, ln_bias, eps)
    carried = shift.index_select(0, slots)
    if len(x) == len(slots):
        previous, last = carried, h
    else:
        previous = torch.roll(h, 1, 0).index_copy_(0, starts[:-1], carried)
        last = h.index_select(0, starts[1:] - 1)
    shift.index_copy_(0, slots, last)
    # Not addcmul or lerp: those round differently with a broadcast operand, depending on the number of rows.
    return ((previous - h) * mix[:, None, :]).add_(h).to(dtype)


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
    """See `kernels.wkv7`."""
    (T, C), (H, N) = r.shape, r_k.shape
    r, k, v, a = (tensor.float().view(T, H, N) for tensor in (r, k, v, a))
    if v_first is not None and value_mix is not None:
        v = torch.lerp(v, v_first.float().view(T, H, N), value_mix.float().view(T, H, N))
    kk = nn.functional.normalize(k * k_k.view(H, N), dim=-1, eps=1e-12)
    k = k * (1 + (a - 1) * k_a.view(H, N))
    w = torch.exp(_LOG_DECAY_BOUND * _sigmoid(decay.float())).view(T, H, N)
    y = _scan(state, slots, starts, torch.stack([kk, w, r, -kk * a, k, v], dim=2)).view(T, C)
    y = nn.functional.group_norm(y, H, ln_weight, ln_bias, eps)
    bonus = (r * k * r_k).sum(-1, keepdim=True) * v
    return ((y + bonus.view(T, C)) * gate.float()).to(gate.dtype)


def _scan(state: torch.Tensor, slots: torch.Tensor, starts: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """Advance every slot's state through its tokens and return what is read out, `y[T, H, N]`.

    `inputs[T, H, 6, N]` holds kk, w, r, -kk*a, k, v side by side, so that one step gathers once. Time advances for
    all sequences of a tile at once; sequences are sorted by length, so those still running are always the first ones.
    """
    T, H, _, N = inputs.shape
    y = inputs.new_empty(T, H, N)
    for rows, first, lengths in _tiles(state, slots, starts, T):
        S = state.index_select(0, slots[rows]).float().view(-1, N, N)
        running = len(lengths)
        for t in range(lengths[0]):
            while lengths[running - 1] <= t:
                running -= 1
            tokens = first[:running] + t
            now = inputs.index_select(0, tokens).view(-1, 6, N)
            y.index_copy_(0, tokens, _advance(S[: running * H], now, state.dtype).view(running, H, N))
        state.index_copy_(0, slots[rows], S.view(-1, H, N, N).to(state.dtype))
    return y


def _advance(S: torch.Tensor, now: torch.Tensor, kept_as: torch.dtype) -> torch.Tensor:
    """One token for a stack of states: `S <- S diag(w) - (S kk)(kk a)^T + v k^T` in place; returns `S r`.

    `S` is `[M, N(value), N(key)]` float32 and becomes what `kept_as` can hold; `now` is `[M, 6, N]` as in `_scan`.
    """
    kk, w, r, v = now[:, 0], now[:, 1], now[:, 2], now[:, 5]
    removed_and_added = torch.stack([_matvec(S, kk), v], dim=2)
    S.mul_(w[:, None, :]).baddbmm_(removed_and_added, now[:, 3:5])
    if kept_as == torch.float16:
        _round_to_half(S, now[:, 3:5], removed_and_added)
    return _matvec(S, r)


def _round_to_half(S: torch.Tensor, columns: torch.Tensor, rows: torch.Tensor) -> None:
    """Round `S[M, N, N]` in place to one of the two neighbours in float16, the nearer one more often.

    The bits of what a token removes and adds decide, `columns[M, 2, N]` and `rows[M, N, 2]`: see `kernels/README.md`.
    """
    of_columns = columns.view(torch.int32).sum(dim=1, dtype=torch.int32) * _COLUMN_HASH
    of_rows = rows.view(torch.int32).sum(dim=2, dtype=torch.int32) * _ROW_HASH
    dither = (of_columns[:, None, :] + of_rows[:, :, None]).bitwise_right_shift_(19).bitwise_and_(_LOST_BITS)
    dither.add_(S.view(torch.int32)).bitwise_and_(~_LOST_BITS)
    S.copy_(torch.where(S.isnan(), S, dither.view(torch.float32)).half())


def _matvec(S: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return `S x` for a stack of matrices, written as `x^T S^T`: several times faster than with columns."""
    if len(S) == 1:  # bmm of one matrix takes another path and rounds differently: a row must not depend on its batch
        return torch.bmm(x.expand(2, -1)[:, None, :], S.expand(2, -1, -1).transpose(1, 2))[:1, 0]
    return torch.bmm(x[:, None, :], S.transpose(1, 2))[:, 0]


def _tiles(
    state: torch.Tensor, slots: torch.Tensor, starts: torch.Tensor, num_tokens: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, list[int]]]:
    """Yield (rows, first token of each, length of each), longest first, in tiles of bounded size."""
    num_rows = len(slots)
    tile = max(1, TILE_BYTES.get(state.device.type, TILE_BYTES["cpu"]) // state[0].nbytes)
    if num_tokens == num_rows:  # all of length one: nothing to sort, and no need to look at values on the host
        order, lengths = torch.arange(num_rows, device=slots.device), [1] * num_rows
    else:
        order = torch.argsort(starts.diff(), descending=True, stable=True)
        lengths = starts.diff()[order].tolist()
    for begin in range(0, num_rows, tile):
        rows = order[begin : begin + tile]
        yield rows, starts[rows], lengths[begin : begin + tile]


def sample(logits: torch.Tensor, rules: torch.Tensor) -> torch.Tensor:
    """See `kernels.sample`."""
    temperature, top_k, top_p, min_p, uniform = rules.T.tolist()
    most, chosen = logits.max(dim=-1)  # a NaN counts as the greatest, and the lowest id wins a tie
    rows = [i for i, value in enumerate(temperature) if value > 0]
    if rows:
        index = torch.tensor(rows, device=logits.device)
        drawn = _draw(
            logits if len(rows) == len(logits) else logits.index_select(0, index),
            [temperature[i] for i in rows],
            [int(top_k[i]) for i in rows],
            [top_p[i] for i in rows],
            [min_p[i] for i in rows],
            [uniform[i] for i in rows],
        )
        chosen.index_copy_(0, index, drawn)
    return chosen.masked_fill_(~torch.isfinite(most), -1)


def _draw(
    logits: torch.Tensor,
    temperature: Sequence[float],
    top_k: Sequence[int],
    top_p: Sequence[float],
    min_p: Sequence[float],
    uniform: Sequence[float],
) -> torch.Tensor:
    """Draw for rows with a temperature above 0."""
    probs = torch.softmax(logits, dim=-1)
    if any(value != 1 for value in temperature):
        # In the log domain, relative to the maximum: no temperature overflows or loses the most likely token.
        weights = ((logits - logits.amax(dim=-1, keepdim=True)) / _column(temperature, logits.device)).exp_()
    else:
        weights = probs
    truncates = [p < 1 or k > 0 for p, k in zip(top_p, top_k, strict=True)]
    if any(truncates) or any(value > 0 for value in min_p):
        weights = torch.where(probs >= _cutoff(probs, top_k, top_p, min_p, truncates), weights, 0)
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    point = _column(uniform, logits.device, torch.float64) * cumulative[:, -1:]
    # The first id whose cumulative weight exceeds the point; an id of weight 0 never does so first.
    return torch.searchsorted(cumulative, point, right=True)[:, 0].clamp_(max=logits.shape[1] - 1)


def _cutoff(
    probs: torch.Tensor,
    top_k: Sequence[int],
    top_p: Sequence[float],
    min_p: Sequence[float],
    truncates: Sequence[bool],
) -> torch.Tensor:
    """Return the least probability that stays in each row, `[R, 1]`."""
    cutoff = _column(min_p, probs.device) * probs.amax(dim=-1, keepdim=True)
    rows = [i for i, value in enumerate(truncates) if value]
    if rows:
        index = torch.tensor(rows, device=probs.device)
        least = _least_by_rank(probs.index_select(0, index), [top_k[i] for i in rows], [top_p[i] for i in rows])
        cutoff.index_copy_(0, index, torch.maximum(cutoff.index_select(0, index), least))
    return cutoff


def _least_by_rank(probs: torch.Tensor, top_k: Sequence[int], top_p: Sequence[float]) -> torch.Tensor:
    """Return the probability of the last token that `top_k` and `top_p` both keep, `[R, 1]`."""
    least, found = _least_among(probs.topk(min(_HEAD, probs.shape[1]), dim=-1).values, top_k, top_p, probs.shape[1])
    rest = [i for i, is_found in enumerate(found.tolist()) if not is_found]
    if rest:
        index = torch.tensor(rest, device=probs.device)
        ranked = probs.index_select(0, index).sort(dim=-1, descending=True).values
        of_rest = _least_among(ranked, [top_k[i] for i in rest], [top_p[i] for i in rest], probs.shape[1])[0]
        least.index_copy_(0, index, of_rest)
    return least


def _least_among(
    ranked: torch.Tensor, top_k: Sequence[int], top_p: Sequence[float], vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_least_by_rank`, looking only at the most likely tokens `ranked[R, K]`; and whether that was enough."""
    last_by_k = torch.tensor([min(k or vocab_size, vocab_size) - 1 for k in top_k], device=ranked.device)
    mass = _column([p if p < 1 else math.inf for p in top_p], ranked.device, torch.float64)
    last_by_p = (ranked.cumsum(dim=-1, dtype=torch.float64) <= mass).sum(dim=-1)
    last = torch.minimum(last_by_k, last_by_p)
    return ranked.gather(1, last.clamp(max=ranked.shape[1] - 1)[:, None]), last < ranked.shape[1]


def logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, num_top: int, excluded_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `kernels.logprobs`."""
    all_of_them = torch.log_softmax(logits, dim=-1)
    own = all_of_them.gather(1, token_ids[:, None])[:, 0]
    all_of_them.index_fill_(1, excluded_ids, -math.inf)
    top, top_ids = all_of_them.topk(min(num_top, logits.shape[1] - len(excluded_ids)), dim=-1)
    if top_ids.shape[1]:
        # Of equal values `topk` may list any first, or leave the lowest id out.
        first = all_of_them.argmax(dim=-1, keepdim=True)
        place = (top_ids == first).byte().argmax(dim=-1, keepdim=True)
        top_ids = top_ids.scatter(1, place, top_ids[:, :1]).scatter(1, torch.zeros_like(place), first)
    return own, top, top_ids


def _column(values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=device)[:, None]
