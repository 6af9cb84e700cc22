"""A state as bytes and back: safetensors with metadata, verified whole. No I/O. The format: docs/state-format.md.

The encoding is canonical: a state of a model has exactly one byte string, header included. So a decoder that knows
which state it wants knows every byte but the payload, and the payload has a digest: nothing can differ unnoticed.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from typing import cast

import torch

from engine.errors import CheckpointRejected
from engine.messages import CheckpointRef, StateSource
from engine.state.spec import RecurrentState, StateSpec

FORMAT = "sostenuto-state"
FORMAT_VERSION = "1"

_MAX_HEADER_BYTES = 1 << 20
_DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # safetensors' names
_LENGTH = struct.Struct("<Q")


def encode_state(state: RecurrentState, spec: StateSpec) -> bytearray:
    """Return `state` as one checkpoint, once it has arrived; equal states give equal bytes.

    Raises `ValueError` if it does not fit `spec`.
    """
    _check_fits(state, spec)
    state.wait()
    metadata = _metadata(spec, state.num_tokens, state.chain)
    header_size = len(_header(spec, metadata, digest="0" * 64))
    blob = bytearray(header_size + spec.num_bytes)
    payload = memoryview(blob)[header_size:]
    end = 0
    for tensor in spec.tensors:
        begin, end = end, end + tensor.num_bytes
        payload[begin:end] = state.tensors[tensor.name].contiguous().reshape(-1).view(torch.uint8).numpy().data
    blob[:header_size] = _header(spec, metadata, _digest(metadata, payload))
    return blob


def decode_state(
    blob: bytes | bytearray | memoryview, spec: StateSpec, wanted: CheckpointRef | StateSource
) -> RecurrentState:
    """Return the state in `blob`, which must be exactly the one that `wanted` names, for the model of `spec`.

    Nothing is returned before everything was verified. Raises `CheckpointRejected` with one of the reasons `format`
    (damaged, cut short, or not a checkpoint), `version`, `fingerprint` (other weights), `layout` (other tensors),
    `chain` (another history) and `digest` (damaged data). The tensors are views of `blob`, which must not change; a
    read-only blob is copied.
    """
    header_size, header = _read_header(blob)
    found = _metadata_of(header)
    expected = _metadata(spec, wanted.num_tokens, wanted.chain)
    _explain_differences(found, expected)
    if header_size + spec.num_bytes != len(blob):
        raise CheckpointRejected("format", f"{len(blob)} bytes, expected {header_size + spec.num_bytes}")
    payload = memoryview(blob)[header_size:]
    digest = _digest(expected, payload)
    if found.get("digest") != digest:
        raise CheckpointRejected("digest", "the data is not what was written")
    if bytes(memoryview(blob)[:header_size]) != _header(spec, expected, digest):
        raise CheckpointRejected("format", "the header is not the canonical one of this state")
    return RecurrentState(wanted.num_tokens, wanted.chain, _tensors(payload, spec))


def derived_id(spec: StateSpec, chain: bytes, computed_by: str) -> str:
    """Return the name of a stored state that follows from what it is: 128 bits in hex.

    `computed_by` names what else its last bits depend on, besides the model and the tokens.
    """
    identity = {**_metadata(spec, 0, chain), "computed_by": computed_by}
    del identity["num_tokens"]  # the chain says it
    return hashlib.blake2b(_canonical_json(identity), digest_size=16, person=b"sostenuto-prefix").hexdigest()


def _check_fits(state: RecurrentState, spec: StateSpec) -> None:
    expected = {tensor.name: (torch.Size(tensor.shape), tensor.dtype) for tensor in spec.tensors}
    if {name: (tensor.shape, tensor.dtype) for name, tensor in state.tensors.items()} != expected:
        raise ValueError("the state's tensors are not those of its spec")


def _metadata(spec: StateSpec, num_tokens: int, chain: bytes) -> dict[str, str]:
    """Return what a checkpoint says about itself, without the digest."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "fingerprint": spec.fingerprint,
        "generation": spec.generation,
        "layout": spec.layout,
        "tensors": " ".join(
            f"{tensor.name}:{_DTYPE_NAMES[tensor.dtype]}[{','.join(map(str, tensor.shape))}]" for tensor in spec.tensors
        ),
        "num_tokens": str(num_tokens),
        "chain": chain.hex(),
    }


def _digest(metadata: Mapping[str, str], payload: memoryview) -> str:
    digest = hashlib.sha256(_canonical_json(metadata))
    digest.update(payload)
    return digest.hexdigest()


def _header(spec: StateSpec, metadata: Mapping[str, str], digest: str) -> bytes:
    """Return length and JSON header as safetensors defines them, padded so that the payload is aligned to 8 bytes."""
    header: dict[str, object] = {"__metadata__": {**metadata, "digest": digest}}
    end = 0
    for tensor in spec.tensors:
        begin, end = end, end + tensor.num_bytes
        header[tensor.name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = _canonical_json(header)
    text += b" " * (-len(text) % 8)
    return _LENGTH.pack(len(text)) + text


def _canonical_json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def _read_header(blob: bytes | bytearray | memoryview) -> tuple[int, Mapping[str, object]]:
    """Return the size of length and header in bytes, and the header."""
    if len(blob) < _LENGTH.size:
        raise CheckpointRejected("format", f"{len(blob)} bytes are no checkpoint")
    (length,) = _LENGTH.unpack_from(blob)
    if length > min(_MAX_HEADER_BYTES, len(blob) - _LENGTH.size):
        raise CheckpointRejected("format", f"a header of {length} bytes does not fit into {len(blob)}")
    header_size = _LENGTH.size + length
    try:
        header = json.loads(bytes(memoryview(blob)[_LENGTH.size : header_size]))
    except (ValueError, RecursionError) as error:
        raise CheckpointRejected("format", "the header is not JSON") from error
    if not isinstance(header, dict):
        raise CheckpointRejected("format", "the header is not an object")
    return header_size, header


def _metadata_of(header: Mapping[str, object]) -> Mapping[str, str]:
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise CheckpointRejected("format", "it is no state checkpoint")
    return cast("dict[str, str]", metadata)


_REASONS = {
    "format_version": "version",
    "fingerprint": "fingerprint",
    "generation": "layout",
    "layout": "layout",
    "tensors": "layout",
    "num_tokens": "chain",
    "chain": "chain",
}


def _explain_differences(found: Mapping[str, str], expected: Mapping[str, str]) -> None:
    for key, reason in _REASONS.items():
        if found.get(key) != expected[key]:
            raise CheckpointRejected(reason, f"{key} is {found.get(key)!r:.200}, expected {expected[key]!r}")


def _tensors(payload: memoryview, spec: StateSpec) -> dict[str, torch.Tensor]:
    data = torch.frombuffer(bytearray(payload) if payload.readonly else payload, dtype=torch.uint8)
    parts = torch.split(data, [tensor.num_bytes for tensor in spec.tensors])
    return {t.name: part.view(t.dtype).view(t.shape) for t, part in zip(spec.tensors, parts, strict=True)}
