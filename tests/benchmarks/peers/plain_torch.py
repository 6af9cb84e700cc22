"""A plain PyTorch RWKV-7 step, as one would write it down: `python plain_torch.py MODEL THREADS`.

Matrices in bfloat16 where PyTorch has instructions for it (else float32, which is faster there), everything small and
the state in float32, all sequences together, a prompt token by token.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from protocol import answer_questions
from safetensors.torch import load_file
from torch import nn


class PlainTorch:
    """Weights by their official names."""

    max_batch = 64
    max_prompt = 24

    def __init__(self, path: str, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self._dtype = torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
        weights = load_file(path)
        self._w = {
            name: w.to(self._dtype) if w.ndim == 2 and "r_k" not in name else w.float().squeeze()
            for name, w in weights.items()
        }
        self._num_layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
        self._num_heads, self._head_size = weights["blocks.0.att.r_k"].shape
        self._width = weights["emb.weight"].shape[1]
        self.begin(1)

    def begin(self, batch_size: int) -> None:
        """Zero states."""
        B, C, H, N = batch_size, self._width, self._num_heads, self._head_size
        self._state = [torch.zeros(B, H, N, N) for _ in range(self._num_layers)]
        self._shift = [[torch.zeros(B, C), torch.zeros(B, C)] for _ in range(self._num_layers)]

    def decode(self, token_ids: list[int]) -> None:
        """One token a row."""
        self._logits = self._step(token_ids)

    def last_logits(self) -> list[float]:
        """Of the last row."""
        logits: list[float] = self._logits[-1].tolist()
        return logits

    def prefill(self, token_ids: list[int]) -> list[float]:
        """One token after the other."""
        self.begin(1)
        for token_id in token_ids:
            logits = self._step([token_id])
        result: list[float] = logits[0].tolist()
        return result

    @torch.inference_mode()
    def _step(self, token_ids: list[int]) -> torch.Tensor:
        w = self._w
        x = self._norm(w["emb.weight"][token_ids].float(), "blocks.0.ln0")
        first_value = None
        for layer in range(self._num_layers):
            block = f"blocks.{layer}."
            mixed, first_value = self._mix_time(self._norm(x, block + "ln1"), layer, first_value)
            x = x + mixed
            h = self._norm(x, block + "ln2")
            previous, self._shift[layer][1] = self._shift[layer][1], h
            key = torch.relu(self._linear(h + (previous - h) * w[block + "ffn.x_k"], block + "ffn.key.weight")) ** 2
            x = x + self._linear(key, block + "ffn.value.weight")
        return self._linear(self._norm(x, "ln_out"), "head.weight")

    def _mix_time(
        self, h: torch.Tensor, layer: int, first_value: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        w, att = self._w, f"blocks.{layer}.att."
        B, H, N = len(h), self._num_heads, self._head_size
        previous, self._shift[layer][0] = self._shift[layer][0], h
        mixed = {name: h + (previous - h) * w[f"{att}x_{name}"] for name in "rwkvag"}

        def low_rank(name: str, activation: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
            first = activation(mixed[name].to(self._dtype) @ w[f"{att}{name}1"])
            return (first @ w[f"{att}{name}2"]).float()

        r, k, v = (
            self._linear(mixed[letter], f"{att}{name}.weight")
            for letter, name in (("r", "receptance"), ("k", "key"), ("v", "value"))
        )
        decay = torch.exp(-0.606531 * torch.sigmoid(w[att + "w0"] + low_rank("w", torch.tanh)))
        rate = torch.sigmoid(w[att + "a0"] + low_rank("a", lambda y: y))
        gate = low_rank("g", torch.sigmoid)
        if first_value is None:
            first_value = v
        else:
            v = v + (first_value - v) * torch.sigmoid(w[att + "v0"] + low_rank("v", lambda y: y))
        removal = nn.functional.normalize((k * w[att + "k_k"]).view(B, H, N), dim=-1)
        k = k * (1 + (rate - 1) * w[att + "k_a"])
        r, k, v, decay, rate = (y.view(B, H, N) for y in (r, k, v, decay, rate))
        state = self._state[layer]
        removed = state @ -removal[..., None]  # [B, H, value, 1]
        state = state * decay[:, :, None] + removed * (removal * rate)[:, :, None] + v[..., None] * k[:, :, None]
        self._state[layer] = state
        y = (state @ r[..., None]).view(B, -1)
        y = nn.functional.group_norm(y, H, w[att + "ln_x.weight"], w[att + "ln_x.bias"], 64e-5)
        y = y + ((r * k * w[att + "r_k"]).sum(-1, keepdim=True) * v).reshape(B, -1)
        return self._linear(y * gate, att + "output.weight"), first_value

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return nn.functional.linear(x.to(self._dtype), self._w[name]).float()

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return nn.functional.layer_norm(x, (self._width,), self._w[name + ".weight"], self._w[name + ".bias"])


if __name__ == "__main__":
    answer_questions(PlainTorch(sys.argv[1], int(sys.argv[2])))
