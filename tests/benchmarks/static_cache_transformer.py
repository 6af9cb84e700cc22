"""A decode step of a transformer with a static key-value cache: what a recurrent model of its size is compared with.

The work of a Llama-like model: grouped-query attention over the whole cache, gated feed-forward, root-mean-square
norms. Weights and cache are random and positions are not rotated: the time of a step depends on neither.
"""

from __future__ import annotations

import torch
from torch import nn


class StaticCacheTransformer:
    """One token for `num_rows` sequences whose caches hold `context` tokens."""

    def __init__(
        self,
        num_rows: int,
        context: int,
        device: torch.device,
        num_layers: int = 24,
        width: int = 2048,
        num_heads: int = 32,
        num_kv_heads: int = 8,
        ffn_width: int = 5632,
        vocab_size: int = 65536,
    ) -> None:
        def weight(outputs: int, inputs: int) -> torch.Tensor:
            return torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16) * inputs**-0.5

        self._num_heads, self._num_kv_heads, self._size = num_heads, num_kv_heads, width // num_heads
        kv_width = num_kv_heads * self._size
        self._embedding, self._head = weight(vocab_size, width), weight(vocab_size, width)
        self._norm = torch.ones(width, device=device, dtype=torch.bfloat16)
        self._layers = [
            (
                weight(width + 2 * kv_width, width),
                weight(width, width),
                weight(2 * ffn_width, width),
                weight(width, ffn_width),
                torch.randn(2, num_rows, num_kv_heads, context, self._size, device=device, dtype=torch.bfloat16),
            )
            for _ in range(num_layers)
        ]

    @property
    def num_parameters(self) -> int:
        """Of all matrices."""
        matrices = [self._embedding, self._head, *(matrix for layer in self._layers for matrix in layer[:4])]
        return sum(matrix.numel() for matrix in matrices)

    def step(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Return the most likely next ids `[B]` of `token_ids[B]`."""
        x = self._embedding.index_select(0, token_ids)
        for qkv, output, up, down, cache in self._layers:
            x = x + nn.functional.linear(self._attend(nn.functional.linear(self._normed(x), qkv), cache), output)
            gate, value = nn.functional.linear(self._normed(x), up).chunk(2, dim=-1)
            x = x + nn.functional.linear(nn.functional.silu(gate) * value, down)
        return nn.functional.linear(self._normed(x), self._head).argmax(dim=-1)

    def _normed(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(x, self._norm.shape, self._norm)

    def _attend(self, qkv: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        kv_width = self._num_kv_heads * self._size
        q, k, v = qkv.split([qkv.shape[1] - 2 * kv_width, kv_width, kv_width], dim=1)
        cache[0, :, :, -1] = k.view(-1, self._num_kv_heads, self._size)
        cache[1, :, :, -1] = v.view(-1, self._num_kv_heads, self._size)
        q = q.view(-1, self._num_heads, 1, self._size)
        return nn.functional.scaled_dot_product_attention(q, cache[0], cache[1], enable_gqa=True).reshape(len(q), -1)
