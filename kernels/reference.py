"""RWKV-7 as its formulas say it: one sequence, one token after the other, any float dtype, no cleverness.

This is what every other implementation is measured against. It is written to be read beside the paper and computes in
the dtype of its inputs: use float64. It takes tensors by their official names and shapes, so nothing between a file
and the result is shared with the engine.

Glossary (paper: "RWKV-7 Goose with Expressive Dynamic State Evolution", Peng et al. 2025, arXiv 2503.14456)

    C       width of the model (n_embd)              H, N    heads and head size, C = H * N
    T       tokens                                   V       vocabulary
    x       residual stream [C]                      h       its layer-normed form, what token shift remembers
    r       receptance: what is read from the state  k, v    key and value written to it
    w       decay per key channel, in (0.545, 1)     dw      its raw, unbounded form
    a       in-context learning rate, in (0, 1)      kk      removal key, of length 1 per head
    g       gate on what was read                    r_k     bonus: how much the present token reads of itself
    v_first the value of layer 0 at this token       S       state of a head, [N value, N key]

The recurrence of one head, section 4 of the paper, with S acting on key channels from the right:

    S_t = S_{t-1} (diag(w_t) - kk_t (a_t * kk_t)^T) + v_t k_t^T
    y_t = S_t r_t

Sources: the paper; BlinkDL/RWKV-LM, RWKV-v7/rwkv_v7_demo.py and rwkv_v7_numpy.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

LN_EPS = 1e-5


@dataclass(slots=True)
class LayerState:
    """What a layer remembers of all tokens so far."""

    att_shift: torch.Tensor  # [C] h of the previous token, before time mixing
    ffn_shift: torch.Tensor  # [C] h of the previous token, before channel mixing
    wkv: torch.Tensor  # [H, N(value), N(key)]


def zero_state(weights: Mapping[str, torch.Tensor]) -> list[LayerState]:
    """Return the state before any token, in the weights' dtype."""
    num_layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    C = weights["emb.weight"].shape[1]
    H, N = weights["blocks.0.att.r_k"].shape
    new = weights["emb.weight"].new_zeros
    return [LayerState(new(C), new(C), new(H, N, N)) for _ in range(num_layers)]


def forward(
    weights: Mapping[str, torch.Tensor],
    token_ids: list[int],
    state: list[LayerState],
    head_norm_eps: float | None = None,
) -> torch.Tensor:
    """Consume `token_ids`, advance `state` in place, and return the logits after each token, `[T, V]`."""
    eps = head_norm_eps if head_norm_eps is not None else 1e-5 * weights["blocks.0.att.r_k"].shape[1]
    return torch.stack([_token(weights, token_id, state, eps) for token_id in token_ids])


def _token(weights: Mapping[str, torch.Tensor], token_id: int, state: list[LayerState], eps: float) -> torch.Tensor:
    x = layer_norm(weights["emb.weight"][token_id], _under(weights, "blocks.0.ln0."))
    v_first: torch.Tensor | None = None
    for i, layer in enumerate(state):
        h = layer_norm(x, _under(weights, f"blocks.{i}.ln1."))
        out, v_first = time_mixing(_under(weights, f"blocks.{i}.att."), h, v_first, layer, eps)
        x = x + out
        h = layer_norm(x, _under(weights, f"blocks.{i}.ln2."))
        x = x + channel_mixing(_under(weights, f"blocks.{i}.ffn."), h, layer)
    return weights["head.weight"] @ layer_norm(x, _under(weights, "ln_out."))


def _under(weights: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix(prefix): tensor.squeeze() if tensor.dim() == 3 else tensor
        for name, tensor in weights.items()
        if name.startswith(prefix)
    }


def layer_norm(x: torch.Tensor, p: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Normalise `x[C]` to mean 0 and variance 1, then scale and shift."""
    return (x - x.mean()) / torch.sqrt(x.var(correction=0) + LN_EPS) * p["weight"] + p["bias"]


def time_mixing(
    p: Mapping[str, torch.Tensor], h: torch.Tensor, v_first: torch.Tensor | None, layer: LayerState, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The recurrent half of a block: `h[C] -> [C]`, and the value of layer 0 for the layers above.

    Sources: paper section 4, figure 3; `RWKV_x070_TMix_one` in ChatRWKV.
    """
    H, N = p["r_k"].shape

    # Token shift: six different blends of this token and the one before.
    d = layer.att_shift - h
    m_r, m_w, m_k, m_v, m_a, m_g = (h + d * p[f"x_{name}"] for name in "rwkvag")
    layer.att_shift = h

    r = p["receptance.weight"] @ m_r
    k = p["key.weight"] @ m_k
    v = p["value.weight"] @ m_v
    dw = p["w0"] + torch.tanh(m_w @ p["w1"]) @ p["w2"]
    a = torch.sigmoid(p["a0"] + m_a @ p["a1"] @ p["a2"])
    g = torch.sigmoid(m_g @ p["g1"]) @ p["g2"]
    if v_first is None:
        v_first = v
    else:
        v = v + (v_first - v) * torch.sigmoid(p["v0"] + m_v @ p["v1"] @ p["v2"])

    # Removal uses the key as projected; only then is the key scaled by the learning rate.
    kk = unit_length((k * p["k_k"]).view(H, N))
    k = k * (1 + (a - 1) * p["k_a"])
    w = torch.exp(-math.exp(-0.5) * torch.sigmoid(dw))

    r, k, v, w, a = (tensor.view(H, N) for tensor in (r, k, v, w, a))
    y = torch.stack([wkv_head(layer.wkv[i], r[i], w[i], k[i], v[i], kk[i], a[i]) for i in range(H)])
    y = group_norm(y, p["ln_x.weight"].view(H, N), p["ln_x.bias"].view(H, N), eps)
    y = y + (r * k * p["r_k"]).sum(dim=1, keepdim=True) * v
    return p["output.weight"] @ (y.reshape(H * N) * g), v_first


def wkv_head(
    S: torch.Tensor,
    r: torch.Tensor,
    w: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kk: torch.Tensor,
    a: torch.Tensor,
) -> torch.Tensor:
    """Advance the state `S[N(value), N(key)]` of one head by one token in place, and read it: `[N]`.

    What the state holds under `kk` is read from the *old* state and taken out in the measure of `a`; `r` reads the
    *new* state.
    """
    removed = S @ kk
    S.copy_(S * w[None, :] - torch.outer(removed, kk * a) + torch.outer(v, k))
    return S @ r


def unit_length(x: torch.Tensor) -> torch.Tensor:
    """Return `x[H, N]` with every row of Euclidean length 1; a row of zeros stays zero."""
    return x / x.square().sum(dim=1, keepdim=True).sqrt().clamp(min=1e-12)


def group_norm(y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise every head of `y[H, N]` by itself, then scale and shift with `weight`, `bias` `[H, N]`."""
    mean = y.mean(dim=1, keepdim=True)
    variance = y.var(dim=1, keepdim=True, correction=0)
    return (y - mean) / torch.sqrt(variance + eps) * weight + bias


def channel_mixing(p: Mapping[str, torch.Tensor], h: torch.Tensor, layer: LayerState) -> torch.Tensor:
    """The feed-forward half of a block, `h[C] -> [C]`: squared ReLU over one blend with the token before."""
    m = h + (layer.ffn_shift - h) * p["x_k"]
    layer.ffn_shift = h
    return p["value.weight"] @ torch.relu(p["key.weight"] @ m).square()
