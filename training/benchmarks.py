"""Public measures of a language model: LAMBADA, and bits per byte of long text with the state carried.

LAMBADA has two protocols, which give two different numbers. BlinkDL's puts the end-of-text id before each passage; the
plain one does not. Both ask for the last word: it counts if each of its tokens is the most likely one, and the
perplexity is that of whole words, so neither depends on how a tokenizer cuts them.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from engine.tokenizer.tokenizer import Tokenizer
from training.data import END_OF_TEXT_ID
from training.evaluate import Score
from training.model import Rwkv7, TrainingState

_PASSAGES_AT_ONCE = 16
_WINDOW_TOKENS = 512


@dataclass(frozen=True, slots=True)
class LambadaScore:
    """Accuracy and perplexity of the last words of passages."""

    num_passages: int
    accuracy: float
    perplexity: float


@torch.no_grad()
def lambada(model: Rwkv7, tokenizer: Tokenizer, passages: Sequence[str], *, prefix_end_of_text: bool) -> LambadaScore:
    """Score passages whose last word, with the space before it, is to be foretold."""
    model.eval()
    correct, log_likelihood = 0, 0.0
    prefix = [END_OF_TEXT_ID] if prefix_end_of_text else []
    pairs = [passage.rsplit(" ", 1) for passage in passages]
    examples = [(prefix + tokenizer.encode(context), tokenizer.encode(" " + word)) for context, word in pairs]
    examples.sort(key=lambda example: len(example[0]) + len(example[1]))
    for begin in range(0, len(examples), _PASSAGES_AT_ONCE):
        for log_probabilities, greedy in _last_words(model, examples[begin : begin + _PASSAGES_AT_ONCE]):
            correct += greedy
            log_likelihood += log_probabilities
    return LambadaScore(len(examples), correct / len(examples), math.exp(-log_likelihood / len(examples)))


def _last_words(model: Rwkv7, examples: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
    """Log-probability of each target and whether greedy decoding says it. Rows are filled up on the right, unseen."""
    width = max(len(context) + len(target) for context, target in examples) - 1
    ids = torch.full((len(examples), width), END_OF_TEXT_ID)
    for row, (context, target) in enumerate(examples):
        whole = (context + target)[:-1]
        ids[row, : len(whole)] = torch.as_tensor(whole)
    x, _ = model(ids.to(model.emb.weight.device))
    results = []
    for row, (context, target) in enumerate(examples):
        logits = model.logits(x[row, len(context) - 1 : len(context) - 1 + len(target)]).float()
        wanted = torch.as_tensor(target, device=logits.device)
        chosen = log_softmax(logits, dim=-1).gather(1, wanted.unsqueeze(1))
        results.append((float(chosen.sum()), bool((logits.argmax(dim=-1) == wanted).all())))
    return results


@torch.no_grad()
def score_text(model: Rwkv7, tokenizer: Tokenizer, text: str) -> Score:
    """Score a text from its first token to its last, the state carried through all of it."""
    model.eval()
    device = model.emb.weight.device
    ids = torch.tensor([[END_OF_TEXT_ID, *tokenizer.encode(text)]], device=device)
    state: TrainingState | None = None
    nats = 0.0
    for begin in range(0, ids.shape[1] - 1, _WINDOW_TOKENS):
        inputs = ids[:, begin : min(begin + _WINDOW_TOKENS, ids.shape[1] - 1)]
        targets = ids[0, begin + 1 : begin + 1 + inputs.shape[1]]
        x, state = model(inputs, state)
        nats -= float(_log_probabilities(model, x[0], targets).sum())
    return Score(nats, ids.shape[1] - 1, len(text.encode()))


def read_passages(path: Path) -> list[str]:
    """The `text` of every JSON line that has one."""
    records = map(json.loads, _read(path).splitlines())
    return [record["text"] for record in records if "text" in record]


def read_text(path: Path) -> str:
    """A text file, gzipped or not."""
    return _read(path)


def _read(path: Path) -> str:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode()


def _log_probabilities(model: Rwkv7, x: Tensor, targets: Tensor) -> Tensor:
    return log_softmax(model.logits(x).float(), dim=-1).gather(1, targets.unsqueeze(1))
