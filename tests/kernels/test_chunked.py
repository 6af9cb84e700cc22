from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from kernels.chunked import wkv7_chunked

N = 64
FLOOR = -math.exp(-0.5)  # RWKV-7's smallest log-decay: exp of it is 0.545

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def test_outputs_and_gradients_over_thousands_of_tokens() -> None:
    """4,096 float32 tokens give the float64 outputs to 2e-6 and gradients to 1e-5, at the decay's floor too."""
    inputs = _inputs(4096, seed=1)
    inputs[1][:, :, 1] = FLOOR  # the second head forgets as fast as RWKV-7 can
    state = _normal(2, 1, 2, N, N)
    exact = [tensor.clone().requires_grad_() for tensor in (*inputs, state)]
    y, S = _recurrence(*exact)
    weights = _normal(3, *y.shape)
    ((y * weights).sum() + S.sum()).backward()

    fast = [tensor.float().requires_grad_() for tensor in (*inputs, state)]
    got_y, got_S = wkv7_chunked(*fast)
    ((got_y * weights.float()).sum() + got_S.sum()).backward()

    for head in (0, 1):
        assert _relative_error(got_y[:, :, head], y[:, :, head]) < 2e-6
        assert _relative_error(got_S[:, head], S[:, head]) < 2e-6
        for got, wanted in zip(fast[:6], exact[:6], strict=True):
            assert _relative_error(_grad(got)[:, :, head], _grad(wanted)[:, :, head]) < 1e-5
        assert _relative_error(_grad(fast[6])[:, head], _grad(exact[6])[:, head]) < 1e-5


@pytest.mark.parametrize("chunk_len", [16, 32, 64, 128])
def test_repeated_keys_with_little_decay_stay_accurate(chunk_len: int) -> None:
    """Equal keys, rates near 1 and hardly any decay, where an inverse by doubling fails, cost no accuracy."""
    r, w, k, v, a, _ = _inputs(256, seed=4)
    a, k = a[:, :1].expand_as(a), k[:, :1].expand_as(k)
    inputs: Inputs = (r, torch.full_like(w, -1e-4), k, v, a, -0.999 * a)
    y, S = _recurrence(*inputs)
    got_y, got_S = wkv7_chunked(*(tensor.float() for tensor in inputs), chunk_len=chunk_len)
    assert _relative_error(got_y, y) < 2e-6
    assert _relative_error(got_S, S) < 2e-6


@pytest.mark.parametrize("num_tokens", [1, 2, 31, 32, 33, 65])
def test_ragged_tails(num_tokens: int) -> None:
    """Any number of tokens is accepted, whole chunks or not."""
    inputs = _inputs(num_tokens, seed=5, rows=3)
    y, S = _recurrence(*inputs)
    got_y, got_S = wkv7_chunked(*inputs)
    torch.testing.assert_close(got_y, y)
    torch.testing.assert_close(got_S, S)


def test_any_split_gives_the_same_outputs() -> None:
    """A sequence in pieces, each beginning with the state the last one left, gives what the whole gives."""
    inputs = _inputs(150, seed=6)
    whole_y, whole_S = wkv7_chunked(*inputs)
    S: Tensor | None = None
    pieces, begin = [], 0
    for size in (1, 40, 7, 64, 38):
        y, S = wkv7_chunked(*(tensor[:, begin : begin + size] for tensor in inputs), state=S)
        pieces.append(y)
        begin += size
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole_y)
    torch.testing.assert_close(S, whole_S)


def test_documents_do_not_see_each_other() -> None:
    """Resets anywhere, several in a chunk too, give each document what it gives alone."""
    inputs, state = _inputs(200, seed=7, rows=2), _normal(8, 2, 2, N, N)
    resets = torch.zeros(2, 200, dtype=torch.bool)
    resets[0, [0, 5, 6, 31, 32, 100]] = True
    resets[1, [64, 199]] = True
    y, S = _recurrence(*inputs, state, resets)
    got_y, got_S = wkv7_chunked(*inputs, state=state, resets=resets)
    torch.testing.assert_close(got_y, y)
    torch.testing.assert_close(got_S, S)


def test_no_gradient_crosses_a_document_border() -> None:
    """What a document's outputs depend on lies within it."""
    inputs = tuple(tensor.requires_grad_() for tensor in _inputs(200, seed=9))
    resets = torch.zeros(1, 200, dtype=torch.bool)
    resets[0, [37, 100]] = True
    y, _ = wkv7_chunked(*inputs, resets=resets)
    y[0, 90:100].sum().backward()
    gradient = _grad(inputs[3])[0]
    assert gradient[37:100].abs().amin(dim=(1, 2)).max() > 0
    assert gradient[:37].abs().max() == 0
    assert gradient[100:].abs().max() == 0


def test_autocast_does_not_reach_the_core() -> None:
    """Under bfloat16 autocast the result is that of float32."""
    inputs = tuple(tensor.float() for tensor in _inputs(96, seed=10))
    plain, _ = wkv7_chunked(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast, _ = wkv7_chunked(*inputs)
    assert under_autocast.dtype == torch.float32
    assert torch.equal(under_autocast, plain)


def test_half_inputs_are_computed_in_single_precision() -> None:
    """bfloat16 inputs are widened first, so the outputs are float32 and exact for those inputs."""
    half = tuple(tensor.bfloat16() for tensor in _inputs(96, seed=11))
    y, _ = _recurrence(*(tensor.double() for tensor in half))
    got, _ = wkv7_chunked(*half)
    assert got.dtype == torch.float32
    assert _relative_error(got, y) < 2e-6


def _recurrence(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, token by token, out of place so that it has gradients."""
    B, _, H, _ = r.shape
    S = r.new_zeros(B, H, N, N) if state is None else state
    outputs = []
    # Unbound once: a slice a token would make each token's gradient as large as the whole sequence.
    for t, (r_t, w_t, k_t, v_t, a_t, b_t) in enumerate(zip(*(x.unbind(1) for x in (r, w, k, v, a, b)), strict=True)):
        if resets is not None:
            S = S.masked_fill(resets[:, t].view(B, 1, 1, 1), 0.0)
        removed = S @ a_t.unsqueeze(3)
        S = S * w_t.exp().unsqueeze(2) + removed * b_t.unsqueeze(2) + v_t.unsqueeze(3) * k_t.unsqueeze(2)
        outputs.append((S @ r_t.unsqueeze(3)).squeeze(3))
    return torch.stack(outputs, dim=1), S


def _inputs(num_tokens: int, seed: int, rows: int = 1) -> Inputs:
    """Two heads as an RWKV-7 layer feeds them: unit removal keys, rates in (0, 1), decays from the floor to 1."""
    r, w, k, v, removal, rate = _normal(seed, 6, rows, num_tokens, 2, N).unbind()
    removal = normalize(removal, dim=3)
    return r, FLOOR * torch.sigmoid(3 * w), 0.1 * k, v, -removal, removal * torch.sigmoid(rate)


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _relative_error(got: Tensor, wanted: Tensor) -> float:
    return float((got.detach().double() - wanted.detach()).abs().max() / wanted.detach().abs().max())


def _grad(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad
