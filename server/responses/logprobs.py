"""Log-probabilities as responses spell them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.messages import TokenLogprobs
from engine.tokenizer import Tokenizer
from server.api.replies import clamped, most_likely


def output_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], entries: Sequence[TokenLogprobs]
) -> list[dict[str, Any]]:
    """Return an entry for each token: how likely it was, and which were most likely."""

    def named(token_id: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token_id)
        return {"token": tokenizer.token_text(token_id), "bytes": list(data), "logprob": logprob}

    return [
        {
            **named(token_id, clamped(entry.logprob)),
            "top_logprobs": [named(top_id, value) for top_id, value in most_likely(entry)],
        }
        for token_id, entry in zip(token_ids, entries, strict=True)
    ]
