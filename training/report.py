"""What `sostenuto eval` reports: the same measures of a model in this process and of one behind a server."""

from __future__ import annotations

import argparse
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import msgspec
import torch

from engine.tokenizer.loading import load as load_tokenizer
from engine.tokenizer.tokenizer import Tokenizer
from training.benchmarks import lambada, multiple_choice, read_passages, read_questions, read_text, score_text
from training.config import TrainConfig
from training.evaluate import recall, recall_probes, score_rows, share_recalled
from training.export import load_model
from training.facts import Half
from training.model import Rwkv7
from training.scoring import Encoder, LocalScorer, Scorer
from training.served import HttpScorer, ServedEncoder, ServedRecall, Server
from training.train import prepare_data

_TIMEOUT_SECONDS = 3600.0  # a whole book is one request

Pairs = list[tuple[str, str]]  # expected, answered
HALVES: dict[str, Half] = {"recall": "held out", "recall_of_known_values": "training"}


@dataclass(frozen=True, slots=True)
class Subject:
    """What is measured."""

    scorer: Scorer
    encoder: Encoder
    recall: Callable[[str, int, int], Pairs | None]  # of a measure, a distance and a number; None: told, not asked


def report(options: argparse.Namespace) -> dict[str, float]:
    """Return the measures that were asked for, by name. Raises `SystemExit` for what does not go together."""
    if options.url:
        with httpx.Client(base_url=options.url, timeout=_TIMEOUT_SECONDS) as client:
            return _measure(_served(client, options), options)
    for name in ("tell", "ask", "conversations", "served_model"):
        if getattr(options, name):
            raise SystemExit(f"eval: --{name.replace('_', '-')} needs a server: --url")
    if options.model is None:
        raise SystemExit("eval: name a model in this process (--model DIR) or a server (--url)")
    model = load_model(options.model)
    tokenizer = load_tokenizer("auto", options.model, model.shape.vocab_size)
    results = _measure(_local(model, tokenizer), options)
    return results | (_held_out(model, tokenizer, options) if options.config else {})


def _local(model: Rwkv7, tokenizer: Tokenizer) -> Subject:
    def recalled(measure: str, distance: int, num_probes: int) -> Pairs:
        return recall(model, tokenizer, distance, num_probes, half=HALVES[measure])[1]

    return Subject(LocalScorer(model), tokenizer, recalled)


def _served(client: httpx.Client, options: argparse.Namespace) -> Subject:
    if options.config:
        raise SystemExit("eval: --config needs the model in this process: --model DIR without --url")
    if (options.tell or options.ask) and not options.conversations:
        raise SystemExit("eval: --tell and --ask need --conversations PREFIX, to find again what was told")
    server = Server(client, options.served_model)
    encoder: Encoder = ServedEncoder(server)
    if options.model is not None:
        encoder = load_tokenizer("auto", options.model, load_model(options.model).shape.vocab_size)
    conversations = ServedRecall(server, encoder, options.conversations or f"recall-{uuid.uuid4().hex[:12]}")

    def recalled(measure: str, distance: int, num_probes: int) -> Pairs | None:
        probes = recall_probes(distance, num_probes, HALVES[measure])
        if not options.ask:
            conversations.tell(probes, f"{measure}-{distance}")
        return None if options.tell else conversations.ask(probes, f"{measure}-{distance}")

    return Subject(HttpScorer(server), encoder, recalled)


def _measure(subject: Subject, options: argparse.Namespace) -> dict[str, float]:
    results: dict[str, float] = {}
    if options.lambada:
        passages = read_passages(options.lambada)[: options.passages]
        for protocol, prefixed in (("end_of_text_first", True), ("plain", False)):
            score = lambada(subject.scorer, subject.encoder, passages, prefix_end_of_text=prefixed)
            results[f"lambada/{protocol}/accuracy"] = score.accuracy
            results[f"lambada/{protocol}/perplexity"] = score.perplexity
    if options.choices:
        choices = multiple_choice(subject.scorer, subject.encoder, read_questions(options.choices))
        results[f"choices/{options.choices.name}/accuracy"] = choices.accuracy
        results[f"choices/{options.choices.name}/accuracy_per_byte"] = choices.accuracy_per_byte
    if options.text:
        text = score_text(subject.scorer, subject.encoder, read_text(options.text))
        results[f"bits_per_byte/{options.text.name}"] = text.bits_per_byte
        results[f"perplexity/{options.text.name}"] = text.perplexity
    return results | (_recall(subject, options) if options.recall else {})


def _recall(subject: Subject, options: argparse.Namespace) -> dict[str, float]:
    results: dict[str, float] = {}
    lines: list[bytes] = []
    for distance in options.distances:
        for measure in HALVES:
            pairs = subject.recall(measure, distance, options.recall)
            if pairs is None:
                continue
            results[f"{measure}/{distance}"] = share_recalled(pairs)
            lines += [msgspec.json.encode([f"{measure}/{distance}", *pair]) + b"\n" for pair in pairs]
    if options.answers is not None:
        Path(options.answers).write_bytes(b"".join(lines))
    return results


def _held_out(model: Rwkv7, tokenizer: Tokenizer, options: argparse.Namespace) -> dict[str, float]:
    token_bytes = torch.tensor([len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size)])
    dataset = prepare_data(TrainConfig.load(options.config), options.run, options.data)
    return {
        f"held_out/{name}/bits_per_byte": score_rows(model, rows, options.rows, token_bytes).bits_per_byte
        for name, rows in dataset.held_out.items()
    }
