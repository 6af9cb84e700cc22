"""WKV-7 over whole sequences as matrix products: the parallel form, for training and long prefills in plain PyTorch.

One head of RWKV-7 carries a matrix `S` [N(value), N(key)] from token to token:

    S_t = S_{t-1} diag(exp(w_t)) + (S_{t-1} a_t) b_t^T + v_t k_t^T        y_t = S_t r_t

Within a chunk of L tokens the rank-one updates depend on each other only through an L x L unitriangular system, so a
chunk is a handful of matrix products and one triangular solve, and its effect on the state is affine:
`S_out = S_in P + Q`. `P` and `Q` are formed for all chunks at once; the only loop is `S @ P + Q`, one product a chunk.

Why this is stable in float32: RWKV-7 bounds the log-decay, w > -exp(-0.5), so the factors exp(c) and exp(-c) of a
chunk's cumulative decay `c` stay inside float32 for chunks of up to 128 tokens. The system must be solved by
substitution: inverting it by doubling (I + M)(I + M^2)... cancels catastrophically when keys repeat and decay is small.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_LEN = 32  # fastest on CPUs; 16 to 64 are within a factor of two


def wkv7_chunked(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    resets: Tensor | None = None,
    chunk_len: int = CHUNK_LEN,
) -> tuple[Tensor, Tensor]:
    """Run WKV-7 over T tokens: the outputs [B, T, H, N] and the state after the last one [B, H, N(value), N(key)].

    r, w, k, v, a, b: [B, T, H, N]; `w` is the log-decay, in (-exp(-0.5), 0). `state` [B, H, N, N] is the one before the
    first token, zero when None. `resets` [B, T] is true where a document begins: the state is zero before that token.
    Any T is accepted. Computes in float32 whatever the inputs are, and under autocast too; in float64 for float64.
    """
    with torch.autocast(r.device.type, enabled=False):
        dtype = torch.promote_types(r.dtype, torch.float32)
        return _wkv7([x.to(dtype) for x in (r, w, k, v, a, b)], state, resets, chunk_len)


def _wkv7(inputs: list[Tensor], state: Tensor | None, resets: Tensor | None, chunk_len: int) -> tuple[Tensor, Tensor]:
    B, T, H, N = inputs[0].shape
    L = min(chunk_len, T)
    r, w, k, v, a, b = (_to_chunks(x, L) for x in inputs)  # [B, H, C, L, N]
    C = r.shape[2]

    c = w.cumsum(dim=3)
    c_end = c[..., -1:, :]
    growth, decay_to_end = torch.exp(-c), torch.exp(c_end - c)
    a_in, r_in = a * torch.exp(c - w), r * torch.exp(c)
    b_end, k_end = b * decay_to_end, k * decay_to_end
    decay = torch.exp(c_end)

    # What each token takes from each earlier one of its chunk: rows are (removal, reading), columns (b, k).
    pairs = torch.cat((a_in, r_in), dim=3) @ torch.cat((b * growth, k * growth), dim=3).transpose(3, 4)
    hidden = torch.ones(L, L, dtype=torch.bool, device=r.device).triu()  # a token's removal sees only earlier tokens
    reading_hidden = hidden.triu(1)
    if resets is not None:
        first, last, apart = _segments(_pad_tokens(resets, C * L - T).view(B, 1, C, L))
        hidden, reading_hidden = hidden | apart, reading_hidden | apart
        a_in, r_in = a_in.masked_fill(~first, 0.0), r_in.masked_fill(~first, 0.0)
        b_end, k_end = b_end.masked_fill(~last, 0.0), k_end.masked_fill(~last, 0.0)
        decay = decay.masked_fill(~first[..., -1:, :], 0.0)
    from_ab = pairs[..., :L, :L].masked_fill(hidden, 0.0)
    from_ak = pairs[..., :L, L:].masked_fill(hidden, 0.0)
    from_rb = pairs[..., L:, :L].masked_fill(reading_hidden, 0.0)
    from_rk = pairs[..., L:, L:].masked_fill(reading_hidden, 0.0)

    # Each token's removal vector u_t = S_{t-1} a_t, affine in the state before the chunk: u = W S^T + U.
    identity = torch.eye(L, dtype=r.dtype, device=r.device)
    solved = torch.linalg.solve_triangular(
        identity - from_ab, torch.cat((a_in, from_ak @ v), dim=4), upper=False, unitriangular=True
    )
    W, U = solved[..., :N], solved[..., N:]
    P = torch.diag_embed(decay.squeeze(3)) + W.transpose(3, 4) @ b_end
    Q = torch.cat((U, v), dim=3).transpose(3, 4) @ torch.cat((b_end, k_end), dim=3)

    S = r.new_zeros(B, H, N, N) if state is None else state.to(r.dtype)
    before = []
    for P_chunk, Q_chunk in zip(P.unbind(2), Q.unbind(2), strict=True):
        before.append(S)
        S = S @ P_chunk + Q_chunk
    S_in = torch.stack(before, dim=2)  # [B, H, C, N, N]

    y = (r_in + from_rb @ W) @ S_in.transpose(3, 4) + torch.cat((from_rb, from_rk), dim=4) @ torch.cat((U, v), dim=3)
    return y.reshape(B, H, C * L, N)[:, :, :T].transpose(1, 2), S


def _to_chunks(x: Tensor, L: int) -> Tensor:
    """[B, T, H, N] to [B, H, C, L, N], the last chunk filled up with zeros, which leave a state as it is."""
    B, T, H, N = x.shape
    return _pad_tokens(x, -T % L).transpose(1, 2).reshape(B, H, -1, L, N)


def _pad_tokens(x: Tensor, num_tokens: int) -> Tensor:
    if num_tokens == 0:
        return x
    return torch.cat((x, x.new_zeros(x.shape[0], num_tokens, *x.shape[2:])), dim=1)


def _segments(resets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of a chunk's first document and of its last one [.., L, 1], and pairs of different ones [.., L, L]."""
    document = resets.long().cumsum(dim=3).unsqueeze(4)
    return document == 0, document == document[..., -1:, :], document != document.transpose(3, 4)
