"""Hugging Face tokenizers: end of text, special tokens, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from engine.errors import TokenizerError
from engine.tokenizer import Tokenizer
from engine.tokenizer.hf import HuggingFaceTokenizer
from tests.engine.tokenizer.conftest import train_byte_level


def save(model: tokenizers.Tokenizer, directory: Path) -> Path:
    """Write `model` to a `tokenizer.json` in `directory`."""
    path = directory / "tokenizer.json"
    model.save(str(path))
    return path


def test_merges_are_used(byte_level: Tokenizer) -> None:
    """Frequent words are one token, and a token's bytes are the text it stands for."""
    (token_id,) = byte_level.encode(" the")
    assert byte_level.token_bytes(token_id) == b" the"


def test_end_of_text_has_id_0(byte_level: Tokenizer) -> None:
    """`<|endoftext|>` ends the text; other special tokens and spare rows are forbidden."""
    assert byte_level.eos_token_ids == (0,)
    assert byte_level.eos_token == "<|endoftext|>"
    assert byte_level.token_bytes(0) == b""
    assert byte_level.forbidden_ids[0] == 1
    assert byte_level.forbidden_ids[-1] == 383


@pytest.mark.parametrize("named", ["<|pad|>", {"content": "<|pad|>", "special": True}])
def test_config_beside_it_names_end_of_text(byte_level_path: Path, tmp_path: Path, named: object) -> None:
    """The eos_token of a tokenizer_config.json wins over the name `<|endoftext|>`."""
    path = tmp_path / "tokenizer.json"
    path.write_bytes(byte_level_path.read_bytes())
    path.with_name("tokenizer_config.json").write_text(json.dumps({"eos_token": named}))
    tokenizer = HuggingFaceTokenizer(path, 384)
    assert (tokenizer.eos_token, tokenizer.eos_token_ids) == ("<|pad|>", (1,))
    assert 0 in tokenizer.forbidden_ids


@pytest.mark.parametrize("config", ['{"eos_token": "the"}', "{"])
def test_config_that_cannot_be_right_is_refused(byte_level_path: Path, tmp_path: Path, config: str) -> None:
    """A config that names no special token as end of text, or is no JSON, is an error."""
    path = tmp_path / "tokenizer.json"
    path.write_bytes(byte_level_path.read_bytes())
    path.with_name("tokenizer_config.json").write_text(config)
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json"):
        HuggingFaceTokenizer(path, 384)


def test_added_tokens_that_are_not_special_have_their_text(tmp_path: Path) -> None:
    """The 20B tokenizer adds runs of spaces as tokens; they are text, even where a lower id has the same bytes."""
    model = train_byte_level()
    model.add_tokens([tokenizers.AddedToken("    ", normalized=True), tokenizers.AddedToken(" t")])
    tokenizer = HuggingFaceTokenizer(save(model, tmp_path), model.get_vocab_size())
    spaces = model.token_to_id("    ")
    assert tokenizer.token_bytes(spaces) == b"    "
    assert spaces in tokenizer.encode("a    b")
    assert len({tokenizer.token_text(i) for i in range(tokenizer.vocab_size)}) == tokenizer.vocab_size


def test_a_space_mark_in_text_is_not_a_space(byte_fallback: Tokenizer) -> None:
    """Vocabularies that write spaces as U+2581 still give that character back where it was meant."""
    assert byte_fallback.decode(byte_fallback.encode("▁hi ▁▁ hi▁")) == "▁hi ▁▁ hi▁"
    assert byte_fallback.encode(" hi") == [byte_fallback.encode(" ")[0], byte_fallback.encode("hi")[0]]


def test_settings_for_batches_are_ignored(tmp_path: Path) -> None:
    """Padding, truncation and added beginnings in the file do not change what a text is encoded to."""
    model = train_byte_level()
    plain = HuggingFaceTokenizer(save(model, tmp_path), 384).encode("hello hello hello")
    model.enable_padding(length=40, pad_id=1, pad_token="<|pad|>")
    model.enable_truncation(max_length=2)
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    assert HuggingFaceTokenizer(save(model, tmp_path), 384).encode("hello hello hello") == plain


def test_composing_normalizer_does_not_lose_bytes(tmp_path: Path) -> None:
    """Where the normalizer would change text (NFC, in the 20B tokenizer), encode_bytes still gives exact bytes."""
    model = train_byte_level()
    model.normalizer = normalizers.NFC()
    tokenizer = HuggingFaceTokenizer(save(model, tmp_path), 384)
    decomposed = "e\u0301".encode()
    assert tokenizer.decode(tokenizer.encode("e\u0301")) == "é"
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode_bytes(decomposed))) == decomposed


def test_vocabulary_without_all_bytes_is_refused(tmp_path: Path) -> None:
    """A vocabulary that would drop characters silently is an error that says how to train a better one."""
    model = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    with pytest.raises(TokenizerError, match=r"241 bytes have no token .*initial_alphabet"):
        HuggingFaceTokenizer(save(model, tmp_path), 256)


def test_tokenizer_that_changes_text_is_refused(tmp_path: Path) -> None:
    """A tokenizer that puts a space before every text would put one into every turn."""
    with pytest.raises(TokenizerError, match="changes text"):
        HuggingFaceTokenizer(save(train_byte_level(add_prefix_space=True), tmp_path), 384)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": 1}'])
def test_broken_file_is_refused(tmp_path: Path, content: str) -> None:
    """A file that is no tokenizer is an error that names it."""
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(TokenizerError, match=r"cannot read tokenizer .*tokenizer\.json"):
        HuggingFaceTokenizer(path, 384)
