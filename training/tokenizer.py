"""Making a byte-level BPE vocabulary for a small model."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from engine.tokenizer.tokenizer import END_OF_TEXT

# Words with the space before them, digits one by one, runs of newlines whole. A run of newlines is a token border
# whatever follows it, so a conversation that is encoded turn by turn has the tokens of the whole text.
_PIECES = r"'(?:s|t|re|ve|m|ll|d)\b| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\n+|\s"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Return a BPE of `vocab_size` tokens; id 0 is the end of text, and every byte has a token."""
    codec = Tokenizer(models.BPE())
    codec.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    codec.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(END_OF_TEXT, special=True)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    codec.train_from_iterator(texts, trainer)
    return codec
