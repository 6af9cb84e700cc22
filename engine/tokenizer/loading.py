"""Which tokenizer a model gets."""

from __future__ import annotations

from pathlib import Path

from engine.errors import TokenizerError
from engine.tokenizer.bytes import NUM_BYTES, ByteTokenizer
from engine.tokenizer.hf import FILE_NAME, HuggingFaceTokenizer
from engine.tokenizer.tokenizer import Tokenizer
from engine.tokenizer.world import NUM_ROWS, NUM_TOKENS, WorldTokenizer


def load(spec: str, model_path: str | Path, vocab_size: int) -> Tokenizer:
    """Return the tokenizer that `spec` names: `auto`, `bytes`, `world`, or the path of a `tokenizer.json`.

    `auto` takes the `tokenizer.json` in the model's directory, else goes by `vocab_size`, the number of rows of the
    model's head: 256 is bytes, 65530 to 65536 is World. Raises `TokenizerError` if there is none, or if it has more
    ids than the model has rows; rows without an id are fine and never sampled.
    """
    match spec:
        case "bytes":
            return ByteTokenizer(vocab_size)
        case "world":
            return WorldTokenizer(vocab_size)
        case "auto":
            return _load_auto(Path(model_path), vocab_size)
        case _:
            return _load_file(Path(spec), vocab_size)


def _load_auto(model_path: Path, vocab_size: int) -> Tokenizer:
    directory = model_path if model_path.is_dir() else model_path.parent
    path = directory / FILE_NAME
    if path.is_file():
        return HuggingFaceTokenizer(path, vocab_size)
    if vocab_size == NUM_BYTES:
        return ByteTokenizer(vocab_size)
    if NUM_TOKENS <= vocab_size <= NUM_ROWS:
        return WorldTokenizer(vocab_size)
    raise TokenizerError(
        f"no tokenizer is known for a model with {vocab_size} rows: there is no {path}, and only {NUM_BYTES} rows mean "
        f"bytes and {NUM_TOKENS} to {NUM_ROWS} the World vocabulary. "
        f"Name one: bytes, world, or the path of a {FILE_NAME}"
    )


def _load_file(path: Path, vocab_size: int) -> Tokenizer:
    if path.is_dir():
        path /= FILE_NAME
    if not path.is_file():
        raise TokenizerError(f"no tokenizer {path}: expected auto, bytes, world, or the path of a {FILE_NAME}")
    return HuggingFaceTokenizer(path, vocab_size)
