"""Tokenizers of each kind, the Hugging Face ones trained on the spot."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from engine.tokenizer import Tokenizer
from engine.tokenizer.bytes import ByteTokenizer
from engine.tokenizer.hf import HuggingFaceTokenizer
from engine.tokenizer.world import WorldTokenizer

TEXT = ["The cat sat on the mat, and the dog did not.", "User: hello\n\nAssistant: good morning, how are you?"] * 8


def train_byte_level(**settings: object) -> tokenizers.Tokenizer:
    """Return a byte-level BPE with `<|endoftext|>` as id 0 and `<|pad|>` as id 1, as `training` makes them."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(**{"add_prefix_space": False} | settings)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(TEXT, trainer)
    return model


def byte_fallback_bpe() -> tokenizers.Tokenizer:
    """Return a BPE over characters, with `▁` for the space and a token for every byte that nothing else covers."""
    pieces = ["<|endoftext|>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "h", "i", "hi", "é"]
    model = tokenizers.Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [("h", "i")], byte_fallback=True)
    )
    model.normalizer = normalizers.Replace(" ", "▁")
    model.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    model.add_special_tokens(["<|endoftext|>"])
    return model


@pytest.fixture(scope="session")
def byte_level_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `tokenizer.json` with a byte-level BPE."""
    path = tmp_path_factory.mktemp("byte_level") / "tokenizer.json"
    train_byte_level().save(str(path))
    return path


@pytest.fixture(scope="session")
def byte_level(byte_level_path: Path) -> Tokenizer:
    """A byte-level BPE on a head with rows to spare."""
    return HuggingFaceTokenizer(byte_level_path, vocab_size=384)


@pytest.fixture(scope="session")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A character BPE with byte fallback."""
    path = tmp_path_factory.mktemp("byte_fallback") / "tokenizer.json"
    byte_fallback_bpe().save(str(path))
    return HuggingFaceTokenizer(path, vocab_size=262)


@pytest.fixture(scope="session", params=["bytes", "world", "byte_level", "byte_fallback"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Each kind of tokenizer in turn."""
    if request.param == "bytes":
        return ByteTokenizer()
    if request.param == "world":
        return WorldTokenizer()
    chosen: Tokenizer = request.getfixturevalue(request.param)
    return chosen
