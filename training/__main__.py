"""`python -m training tokenize|train|export|eval|curves|generate`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from engine.tokenizer.hf import FILE_NAME
from engine.tokenizer.loading import load as load_tokenizer
from training.config import TrainConfig

_RECALL_DISTANCES = (1, 3, 5, 8, 12)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    options = _parser().parse_args(arguments)
    match options.command:
        case "tokenize":
            tokenize(TrainConfig.load(options.config), options.run, options.data)
        case "train":
            _train(options)
        case "export":
            _export(options)
        case "eval":
            _evaluate(options)
        case "curves":
            from training.curves import draw_curves

            draw_curves(options.run / "log.jsonl", options.to)
        case "generate":
            _generate(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training", description="Train RWKV-7 models.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("tokenize", "make the vocabulary and the token tables of a run"),
        ("train", "train, or go on from the newest checkpoint; run it under torchrun for several processes"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("--config", type=Path, required=True, metavar="FILE", help="TOML; docs/training.md")
        command.add_argument("--run", type=Path, required=True, metavar="DIR", help="of tokens, checkpoints and logs")
        command.add_argument(
            "--data", type=Path, default=Path(), metavar="DIR", help="that the sources' paths are below"
        )
        if name == "train":
            command.add_argument("--max-minutes", type=float, help="stop with a checkpoint after this time")
            command.add_argument("--steps", type=int, help="instead of the configuration's num_steps")
            command.add_argument("--device", help="cpu, cuda, cuda:1")

    command = commands.add_parser("export", help="write a run's weights and tokenizer as a model to serve")
    command.add_argument("--run", type=Path, required=True, metavar="DIR")
    command.add_argument("--to", type=Path, required=True, metavar="DIR")
    command.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    command.add_argument(
        "--best", action="store_true", help="the lowest held-out loss instead of the newest checkpoint"
    )

    command = commands.add_parser("eval", help="measure a model; the last line is one JSON object")
    command.add_argument(
        "--model", type=Path, metavar="DIR", help="of the model; with --url only its tokenizer is used"
    )
    command.add_argument("--url", help="of a server whose model is measured, over HTTP, instead of one in this process")
    command.add_argument("--served-model", metavar="NAME", help="the model's name there")
    command.add_argument("--lambada", type=Path, metavar="FILE", help="JSON lines with `text`")
    command.add_argument("--passages", type=int, help="only the first so many")
    command.add_argument("--choices", type=Path, metavar="FILE", help="JSON lines with `context`, `choices`, `answer`")
    command.add_argument("--text", type=Path, metavar="FILE", help="for bits per byte and perplexity")
    command.add_argument("--recall", type=int, metavar="N", help="probes of held-out facts at each distance")
    command.add_argument("--distances", type=int, nargs="+", default=_RECALL_DISTANCES, metavar="TURNS", help="those")
    command.add_argument(
        "--answers", type=Path, metavar="FILE", help="write every answer to a probe there, a line each"
    )
    command.add_argument("--conversations", metavar="PREFIX", help="of the probes' conversations at --url")
    halves = command.add_mutually_exclusive_group()
    halves.add_argument("--tell", action="store_true", help="tell the facts at --url, ask for nothing yet")
    halves.add_argument("--ask", action="store_true", help="ask for what was told under --conversations before")
    command.add_argument(
        "--config", type=Path, metavar="FILE", help="a run's, for bits per byte of its held-out documents"
    )
    command.add_argument("--run", type=Path, metavar="DIR", help="that run")
    command.add_argument("--data", type=Path, default=Path(), metavar="DIR", help="its sources")
    command.add_argument("--rows", type=int, default=64, help="of each source, at most")

    command = commands.add_parser("curves", help="draw a run's curves")
    command.add_argument("--run", type=Path, required=True, metavar="DIR")
    command.add_argument("--to", type=Path, required=True, metavar="FILE.png")

    command = commands.add_parser("generate", help="go on from a text, or answer a message")
    command.add_argument("--model", type=Path, required=True, metavar="DIR")
    command.add_argument("--prompt", required=True)
    command.add_argument("--chat", action="store_true", help="the prompt is a user's message")
    command.add_argument("--max-tokens", type=int, default=128)
    return parser


def tokenize(config: TrainConfig, run_dir: Path, data_dir: Path) -> None:
    """Make the vocabulary, if there is none, and every missing token table."""
    from training.documents import read_documents
    from training.tokenizer import train_tokenizer
    from training.train import prepare_data

    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / FILE_NAME
    if config.data.tokenizer == "auto" and not path.exists():
        texts = (
            "".join(piece.text for piece in document)
            for source in config.data.sources
            if not source.path.endswith(".bin")
            for document in read_documents(source, data_dir, config.run.seed)
        )
        train_tokenizer(texts, config.model.vocab_size).save(str(path))
    for name, num_tokens in prepare_data(config, run_dir, data_dir).sizes.items():
        print(f"{name}: {num_tokens} tokens")


def _train(options: argparse.Namespace) -> None:
    from training.train import train

    config = TrainConfig.load(options.config)
    if options.steps is not None:
        config = config.with_run(num_steps=options.steps)
    if options.device is not None:
        config = config.with_run(device=options.device)
    tokenize(config, options.run, options.data)
    progress = train(config, options.run, options.data, max_minutes=options.max_minutes)
    print(f"{progress.step} steps, {progress.num_tokens} tokens, {progress.num_skipped} steps skipped")


def _export(options: argparse.Namespace) -> None:
    from training.export import export

    print(export(options.run, options.to, dtype=getattr(torch, options.dtype), best=options.best))


def _evaluate(options: argparse.Namespace) -> None:
    from training.report import report

    results = report(options)
    for name, value in results.items():
        print(f"{name:45} {value:.4f}")
    print(json.dumps(results))


def _generate(options: argparse.Namespace) -> None:
    from training.data import END_OF_TEXT_ID
    from training.evaluate import encode_prompt
    from training.export import load_model
    from training.generate import generate_greedy

    model = load_model(options.model)
    tokenizer = load_tokenizer("auto", options.model, model.shape.vocab_size)
    stop_ids = [END_OF_TEXT_ID]
    if options.chat:
        prompt = encode_prompt(tokenizer, [{"role": "user", "content": options.prompt}])
        stop_ids += tokenizer.encode("\n\n")
    else:
        prompt = tokenizer.encode(options.prompt)
    [answer] = generate_greedy(model, [prompt or [END_OF_TEXT_ID]], options.max_tokens, stop_ids)
    print(tokenizer.decode(answer))


if __name__ == "__main__":
    main()
