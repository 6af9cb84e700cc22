"""Tokenizers: text to ids, ids to bytes, bytes to text. Torch-free; both processes use it."""

from engine.tokenizer.detokenizer import Detokenizer
from engine.tokenizer.loading import load
from engine.tokenizer.tokenizer import END_OF_TEXT, Tokenizer

__all__ = ["END_OF_TEXT", "Detokenizer", "Tokenizer", "load"]
