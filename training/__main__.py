"""`python -m training tokenize|train|...`."""

from __future__ import annotations

import argparse
from pathlib import Path

from training.config import TrainConfig


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="training", description="Train RWKV-7 models.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("tokenize", "make the vocabulary and the token tables"), ("train", "train, or go on training")):
        command = commands.add_parser(name, help=text)
        command.add_argument("--config", type=Path, required=True)
        command.add_argument("--run", type=Path, required=True, help="directory of the run: tokens, checkpoints, logs")
        command.add_argument("--data", type=Path, default=Path(), help="directory that the sources' paths are below")
        if name == "train":
            command.add_argument("--max-minutes", type=float)
            command.add_argument("--steps", type=int)
            command.add_argument("--decay-steps", type=int)
    options = parser.parse_args(arguments)
    config = TrainConfig.load(options.config)
    if options.command == "tokenize":
        tokenize(config, options.run, options.data)
    else:
        from training.train import train

        tokenize(config, options.run, options.data)
        if options.steps:
            config = config.with_run(num_steps=options.steps)
        print(train(config, options.run, options.data, max_minutes=options.max_minutes))


def tokenize(config: TrainConfig, run_dir: Path, data_dir: Path) -> None:
    """Make the vocabulary, if there is none, and every missing token table."""
    from training.documents import read_documents
    from training.tokenizer import train_tokenizer
    from training.train import prepare_data

    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / config.data.tokenizer
    if not path.exists():
        texts = (
            "".join(piece.text for piece in document)
            for source in config.data.sources
            for document in read_documents(source, data_dir, config.run.seed)
        )
        train_tokenizer(texts, config.model.vocab_size).save(str(path))
    for name, rows in prepare_data(config, run_dir, data_dir).training.items():
        print(f"{name}: {len(rows)} rows, {rows.num_tokens} tokens")


if __name__ == "__main__":
    main()
