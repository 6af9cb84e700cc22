"""How good a model is: loss and bits per byte on documents it has not seen, and what it remembers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from engine.tokenizer.tokenizer import Tokenizer
from training.data import Batch, Rows
from training.dialogues import RecallProbe, recall_probe
from training.documents import BORDER, chat
from training.facts import Half
from training.generate import generate_greedy
from training.model import Rwkv7

_ROWS_AT_ONCE = 8
_ANSWER_TOKENS = 24


@dataclass(frozen=True, slots=True)
class Score:
    """A sum of losses and what it was summed over."""

    nats: float
    weight: float  # tokens, by their weights
    num_bytes: float  # of text behind them, by the same weights

    @property
    def loss(self) -> float:
        """Nats a token; NaN of nothing."""
        return self.nats / self.weight if self.weight else math.nan

    @property
    def perplexity(self) -> float:
        """Of a token; it depends on how the tokenizer cuts."""
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Bits a byte of text, which unlike the loss does not depend on the tokenizer."""
        return self.nats / math.log(2) / self.num_bytes if self.num_bytes else math.nan


@torch.no_grad()
def score_rows(model: Rwkv7, rows: Rows, max_rows: int, token_bytes: Tensor) -> Score:
    """Score the first `max_rows` rows. `token_bytes` [V] is the number of bytes of each token."""
    was_training = model.training
    model.eval()
    device = model.emb.weight.device
    nats = weight = num_bytes = 0.0
    indices = range(min(max_rows, len(rows)))
    for begin in range(0, len(indices), _ROWS_AT_ONCE):
        batch = rows.batch(indices[begin : begin + _ROWS_AT_ONCE]).to(device)
        losses, weights, targets = token_losses(model, batch)
        nats += float((losses * weights).sum())
        weight += float(weights.sum())
        num_bytes += float((token_bytes.to(device)[targets] * weights).sum())
    model.train(was_training)
    return Score(nats, weight, num_bytes)


def token_losses(model: Rwkv7, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of the targets that count, their weights, and their ids: [number of them] each."""
    x, _ = model(batch.inputs, None, batch.resets)
    counts = batch.weights > 0
    logits = model.logits(x[counts]).float()
    return (
        cross_entropy(logits, batch.targets[counts], reduction="none"),
        batch.weights[counts],
        batch.targets[counts],
    )


def recall(
    model: Rwkv7, tokenizer: Tokenizer, distance: int, num_probes: int, *, half: Half = "held out", seed: int = 0
) -> tuple[float, list[tuple[str, str]]]:
    """The share of facts that greedy answers name `distance` turns later, and every (expected, answer).

    The facts are of values that no training dialogue tells, or of those that some do, in dialogues never seen.
    """
    probes = recall_probes(distance, num_probes, half, seed)
    prompts = [encode_prompt(tokenizer, probe.messages) for probe in probes]
    stops = [0, tokenizer.encode(BORDER)[0]]
    answers = [tokenizer.decode(ids) for ids in generate_greedy(model, prompts, _ANSWER_TOKENS, stops)]
    pairs = [(probe.expected, answer) for probe, answer in zip(probes, answers, strict=True)]
    return share_recalled(pairs), pairs


def recall_probes(distance: int, num_probes: int, half: Half, seed: int = 0) -> list[RecallProbe]:
    """The dialogues whose last message asks for a fact told `distance` turns before."""
    return [recall_probe(distance, seed, index, half) for index in range(num_probes)]


def share_recalled(pairs: Sequence[tuple[str, str]]) -> float:
    """The share of (expected, answer) whose answer names what is expected."""
    return sum(names(answer, expected) for expected, answer in pairs) / len(pairs)


def names(answer: str, expected: str) -> bool:
    """Say whether the answer contains the value as whole words, whatever its capitals."""
    padded = "".join(character if character.isalnum() else " " for character in answer.lower())
    return f" {expected.lower()} " in f" {padded} "


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[dict[str, str]]) -> list[int]:
    """Encode a dialogue that waits for an answer, as the server does."""
    pieces = [piece.text for piece in chat(messages, 0.0)] + [BORDER, "Assistant:"]
    return [token for piece in pieces for token in tokenizer.encode(piece)]
