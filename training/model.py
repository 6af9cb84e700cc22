"""RWKV-7 as a trainable module, with the parameter names of the official checkpoints.

What it computes is what the engine computes; what is here and not there is gradients and the initialisation of the
reference recipe (RWKV-LM, RWKV-v7/train_temp). Whole sequences go through the chunked form; a state may come in and
goes out, so the same module trains, carries a state from one window to the next, and generates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import group_norm, normalize, relu
from torch.utils.checkpoint import checkpoint

from kernels.chunked import wkv7_chunked

LOG_DECAY_FLOOR = -math.exp(-0.5)  # of RWKV-7: a step keeps at least exp(LOG_DECAY_FLOOR) = 0.545 of a channel


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Everything that determines the parameters of an RWKV-7 model."""

    vocab_size: int
    width: int
    num_layers: int
    head_size: int = 64

    def __post_init__(self) -> None:
        if self.width % self.head_size:
            raise ValueError(f"width {self.width} is not a multiple of the head size {self.head_size}")

    @property
    def num_heads(self) -> int:
        """Heads of a layer."""
        return self.width // self.head_size

    def rank(self, factor: float) -> int:
        """Width of a low-rank pair of matrices: about `factor * sqrt(width)`, in steps of 32."""
        return max(32, 32 * round(factor * math.sqrt(self.width) / 32))


@dataclass(frozen=True, slots=True)
class TrainingState:
    """States of a batch, between two windows of its rows: wkv [L, B, H, N(value), N(key)], shift [L, 2, B, C]."""

    wkv: Tensor
    shift: Tensor

    def detach(self) -> TrainingState:
        """The same state, through which no gradient flows back."""
        return TrainingState(self.wkv.detach(), self.shift.detach())

    def split(self, num_rows: int) -> Iterator[TrainingState]:
        """States of so many rows each."""
        for wkv, shift in zip(
            torch.split(self.wkv, num_rows, dim=1), torch.split(self.shift, num_rows, dim=2), strict=True
        ):
            yield TrainingState(wkv, shift)

    @staticmethod
    def join(states: Sequence[TrainingState]) -> TrainingState:
        """The states of all rows in one."""
        wkv = torch.cat([state.wkv for state in states], dim=1)
        return TrainingState(wkv, torch.cat([state.shift for state in states], dim=2))


class Rwkv7(nn.Module):
    """An RWKV-7 language model."""

    def __init__(self, shape: ModelShape, *, recompute: bool = False) -> None:
        super().__init__()
        self.shape = shape
        self.recompute = recompute  # trade a second forward pass for the memory of activations
        self.emb = nn.Embedding(shape.vocab_size, shape.width)
        self.blocks = nn.ModuleList(Block(shape, layer) for layer in range(shape.num_layers))
        self.ln_out = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocab_size, bias=False)
        nn.init.uniform_(self.emb.weight, -1e-4, 1e-4)
        gain = 0.5 * math.sqrt(max(1.0, shape.vocab_size / shape.width))
        nn.init.orthogonal_(self.head.weight, gain=gain)

    def initial_state(self, num_rows: int) -> TrainingState:
        """The state before the first token, for `num_rows` rows: zero, or `time_state` where it is tuned."""
        H, N = self.shape.num_heads, self.shape.head_size
        zero = torch.zeros(H, N, N, device=self.emb.weight.device)
        starts = [zero if layer.time_state is None else layer.time_state for layer in self.time_mixes()]
        wkv = torch.stack(starts).unsqueeze(1).expand(-1, num_rows, -1, -1, -1)
        return TrainingState(wkv, zero.new_zeros(self.shape.num_layers, 2, num_rows, self.shape.width))

    def time_mixes(self) -> list[TimeMix]:
        """The time mixing of every layer."""
        return [block.att for block in self.blocks if isinstance(block, Block)]

    def compile_blocks(self) -> None:
        """Compile what training runs; evaluation and generation, whose shapes vary, stay as they are."""
        for block in self.blocks:
            block.compile()

    def forward(
        self, ids: Tensor, state: TrainingState | None = None, resets: Tensor | None = None
    ) -> tuple[Tensor, TrainingState]:
        """What the head reads after each of `ids` [B, T]: [B, T, C]; and the state after the last.

        `resets` [B, T] is true where a document begins: nothing before it reaches it.
        """
        state = state if state is not None else self.initial_state(ids.shape[0])
        x = self.emb(ids)
        v_first: Tensor | None = None
        wkvs, shifts = [], []
        for layer, block in enumerate(self.blocks):
            inputs = (x, v_first, state.wkv[layer], state.shift[layer], resets)
            if not self.training:
                x, v_first, wkv, shift = block.forward(*inputs)
            elif self.recompute:
                x, v_first, wkv, shift = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x, v_first, wkv, shift = block(*inputs)
            wkvs.append(wkv)
            shifts.append(shift)
        return self.ln_out(x), TrainingState(torch.stack(wkvs), torch.stack(shifts))

    def logits(self, x: Tensor) -> Tensor:
        """Logits [.., V] of what `forward` returns, or of some of it."""
        out: Tensor = self.head(x)
        return out


class Block(nn.Module):
    """One layer: time mixing, then channel mixing, each behind its norm."""

    def __init__(self, shape: ModelShape, layer: int) -> None:
        super().__init__()
        self.ln0 = nn.LayerNorm(shape.width) if layer == 0 else None
        self.ln1 = nn.LayerNorm(shape.width)
        self.ln2 = nn.LayerNorm(shape.width)
        self.att = TimeMix(shape, layer)
        self.ffn = ChannelMix(shape, layer)

    def forward(
        self, x: Tensor, v_first: Tensor | None, wkv: Tensor, shift: Tensor, resets: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The layer's output, the first layer's values, and the layer's state after the last token."""
        if self.ln0 is not None:
            x = self.ln0(x)
        mixed = self.ln1(x)
        out, v_first, wkv = self.att(mixed, _previous(mixed, shift[0], resets), v_first, wkv, resets)
        x = x + out
        channels = self.ln2(x)
        x = x + self.ffn(channels, _previous(channels, shift[1], resets))
        return x, v_first, wkv, torch.stack((mixed[:, -1], channels[:, -1])).float()


class TimeMix(nn.Module):
    """The recurrent half of a layer."""

    def __init__(self, shape: ModelShape, layer: int) -> None:
        super().__init__()
        self.num_heads = shape.num_heads
        self.time_state: nn.Parameter | None
        self.register_parameter("time_state", None)  # [H, N(value), N(key)] when initial states are tuned
        C, H, N = shape.width, shape.num_heads, shape.head_size
        depth = layer / max(1, shape.num_layers - 1)  # 0 in the first layer, 1 in the last
        height = 1 - layer / shape.num_layers
        n = torch.arange(C, dtype=torch.float32)
        line = (n / max(1, C - 1) - 0.5).view(1, 1, C)
        within = (n % N - (N - 1) / 2) / ((N - 1) / 2)  # -1..1 along each head
        zigzag = (within * within.abs()).view(1, 1, C)

        self.x_r = _mix(C, 0.2 * height)
        self.x_w = _mix(C, 0.9 * height)
        self.x_k = _mix(C, 0.7 * height)
        self.x_v = _mix(C, 0.7 * height)
        self.x_a = _mix(C, 0.9 * height)
        self.x_g = _mix(C, 0.2 * height)

        speed = -6.0 + 6.0 * (line + 0.5) ** (1 + depth**0.3)
        self.w0 = nn.Parameter(speed + 0.5 + 2.5 * zigzag)
        self.w1, self.w2 = _low_rank(C, shape.rank(2.5))
        self.a0 = nn.Parameter(-0.19 + 0.3 * zigzag + 0.4 * line)
        self.a1, self.a2 = _low_rank(C, shape.rank(2.5))
        if layer > 0:
            self.v0 = nn.Parameter(0.73 - 0.4 * line)
            self.v1, self.v2 = _low_rank(C, shape.rank(1.7))
        self.g1, self.g2 = _low_rank(C, shape.rank(5.0))

        self.k_k = nn.Parameter(0.71 - 0.1 * line)
        self.k_a = nn.Parameter(torch.full((1, 1, C), 1.02))
        self.r_k = nn.Parameter(torch.full((H, N), -0.04))
        self.receptance = _linear(C, C, gain=1.0)
        self.key = _linear(C, C, gain=0.1)
        self.value = _linear(C, C, gain=1.0)
        self.output = _linear(C, C, gain=0.0)
        self.ln_x = nn.GroupNorm(H, C, eps=1e-5 * N)
        nn.init.constant_(self.ln_x.weight, ((1 + layer) / shape.num_layers) ** 0.7)

    def forward(
        self, x: Tensor, previous: Tensor, v_first: Tensor | None, wkv: Tensor, resets: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The mixed tokens [B, T, C], the first layer's values, and the state matrices after the last token."""
        B, T, C = x.shape
        H = self.num_heads
        delta = previous - x
        r = self.receptance(x + delta * self.x_r)
        log_decay = LOG_DECAY_FLOOR * torch.sigmoid(self.w0 + torch.tanh((x + delta * self.x_w) @ self.w1) @ self.w2)
        k = self.key(x + delta * self.x_k)
        x_v = x + delta * self.x_v
        v = self.value(x_v)
        if v_first is None:
            v_first = v
        else:
            v = v + (v_first - v) * torch.sigmoid(self.v0 + (x_v @ self.v1) @ self.v2)
        a = torch.sigmoid(self.a0 + ((x + delta * self.x_a) @ self.a1) @ self.a2)
        g = torch.sigmoid((x + delta * self.x_g) @ self.g1) @ self.g2

        removal = normalize((k * self.k_k).view(B, T, H, -1).float(), dim=-1)
        k = k * (1 + (a - 1) * self.k_a)
        r, log_decay, k, v, a = (y.view(B, T, H, -1) for y in (r, log_decay, k, v, a))
        y, wkv = wkv7_chunked(r.float(), log_decay, k, v, -removal, removal * a, wkv, resets)
        y = group_norm(y.reshape(B * T, C), H, self.ln_x.weight, self.ln_x.bias, self.ln_x.eps).view(B, T, C)
        bonus = (r * k * self.r_k).sum(dim=-1, keepdim=True) * v
        return self.output((y + bonus.view(B, T, C)) * g), v_first, wkv


class ChannelMix(nn.Module):
    """The feed-forward half of a layer: squared ReLU, four times the width."""

    def __init__(self, shape: ModelShape, layer: int) -> None:
        super().__init__()
        C = shape.width
        self.x_k = _mix(C, (1 - layer / shape.num_layers) ** 4)
        self.key = _linear(C, 4 * C, gain=1.0)
        self.value = _linear(4 * C, C, gain=0.0)

    def forward(self, x: Tensor, previous: Tensor) -> Tensor:
        """The mixed channels [B, T, C]."""
        hidden = relu(self.key(x + (previous - x) * self.x_k))
        out: Tensor = self.value(hidden * hidden)
        return out


def _previous(x: Tensor, carried: Tensor, resets: Tensor | None) -> Tensor:
    """Each token's predecessor [B, T, C]: `carried` [B, C] before the first, zero at the start of a document."""
    previous = torch.cat((carried.to(x.dtype).unsqueeze(1), x[:, :-1]), dim=1)
    return previous if resets is None else previous.masked_fill(resets.unsqueeze(2), 0.0)


def _mix(width: int, power: float) -> nn.Parameter:
    return nn.Parameter((1 - (torch.arange(width) / width) ** power).view(1, 1, width))


def _low_rank(width: int, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """A pair [C, rank], [rank, C] whose product starts at zero."""
    second = torch.empty(rank, width)
    nn.init.orthogonal_(second, gain=0.1 * math.sqrt(max(1.0, rank / width)))
    return nn.Parameter(torch.zeros(width, rank)), nn.Parameter(second)


def _linear(inputs: int, outputs: int, gain: float) -> nn.Linear:
    """A linear map without bias, orthogonal with the given gain, or zero."""
    linear = nn.Linear(inputs, outputs, bias=False)
    if gain == 0.0:
        nn.init.zeros_(linear.weight)
    else:
        nn.init.orthogonal_(linear.weight, gain=gain)
    return linear
