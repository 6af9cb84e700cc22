"""Tokenizers: text to ids, ids to bytes, bytes to text. Torch-free; both processes use it."""
