"""The identity of a model's weights: equal in every file format, different if one bit of one tensor differs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256, in hex, over the names, dtypes, shapes and data of `tensors` in the order of their names.

    The data of each tensor is hashed by itself, so that large models use every core: hashlib releases the lock.
    """
    names = sorted(tensors)
    whole = hashlib.sha256(b"sostenuto-weights-1")
    with ThreadPoolExecutor() as pool:
        for name, digest in zip(names, pool.map(lambda name: _data_digest(tensors[name]), names), strict=True):
            tensor = tensors[name]
            dtype = str(tensor.dtype).removeprefix("torch.")
            shape = "x".join(str(size) for size in tensor.shape)
            whole.update(f"\n{name}\t{dtype}\t{shape}\t{digest}".encode())
    return whole.hexdigest()


def _data_digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()
