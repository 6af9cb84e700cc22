"""State checkpoints: whole and the one asked for, or rejected."""

from __future__ import annotations

import json
import struct
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import CheckpointRejected
from engine.messages import CheckpointRef, StateSource
from engine.state.checkpoint import decode_state, encode_state
from engine.state.spec import RecurrentState, StateSpec, TensorSpec

SPEC = StateSpec(
    fingerprint="ab" * 32,
    generation="7",
    layout="value_key",
    tensors=(TensorSpec("wkv", (2, 2, 4, 4), torch.float32), TensorSpec("shift", (2, 2, 8), torch.float32)),
)
CHAIN = bytes(range(16))
REF = CheckpointRef(checkpoint_id="x", num_tokens=321, chain=CHAIN)


def make_state() -> RecurrentState:
    """Return a state of SPEC with random values, a NaN, an infinity and a negative zero among them."""
    random = torch.Generator().manual_seed(4)
    tensors = {t.name: torch.randn(t.shape, generator=random) for t in SPEC.tensors}
    tensors["wkv"].view(-1)[:3] = torch.tensor([torch.nan, -torch.inf, -0.0])
    return RecurrentState(321, CHAIN, tensors)


BLOB = bytes(encode_state(make_state(), SPEC))
HEADER_BYTES = 8 + struct.unpack_from("<Q", BLOB)[0]


def rejection(blob: bytes, spec: StateSpec = SPEC, wanted: CheckpointRef | StateSource = REF) -> str:
    """Return the reason for which `blob` is rejected."""
    with pytest.raises(CheckpointRejected) as caught:
        decode_state(blob, spec, wanted)
    return caught.value.reason


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
@pytest.mark.parametrize("wanted", [REF, StateSource(num_tokens=321, chain=CHAIN)], ids=["reference", "source"])
def test_what_was_encoded_is_decoded_bit_for_bit(kind: type, wanted: CheckpointRef | StateSource) -> None:
    """Every bit of every tensor comes back, NaN included, with the number of tokens and the chain."""
    state, original = decode_state(kind(BLOB), SPEC, wanted), make_state()
    assert (state.num_tokens, state.chain) == (321, CHAIN)
    assert state.tensors.keys() == original.tensors.keys()
    for name, tensor in original.tensors.items():
        assert torch.equal(state.tensors[name].view(torch.int32), tensor.view(torch.int32))


def test_equal_states_have_equal_bytes() -> None:
    """The encoding is canonical: nothing in it depends on when, where or in which order it was made."""
    state = make_state()
    reordered = replace(state, tensors=dict(reversed(state.tensors.items())))
    assert bytes(encode_state(reordered, SPEC)) == BLOB


def test_safetensors_reads_it() -> None:
    """A checkpoint is a safetensors file: any tool opens it, names, shapes, values and metadata."""
    tensors = safetensors.torch.load(BLOB)
    assert torch.equal(tensors["shift"], make_state().tensors["shift"])
    metadata = json.loads(BLOB[8:HEADER_BYTES])["__metadata__"]
    assert metadata["num_tokens"] == "321"
    assert metadata["chain"] == CHAIN.hex()
    assert metadata["tensors"] == "wkv:F32[2,2,4,4] shift:F32[2,2,8]"


def test_the_payload_is_aligned() -> None:
    """Tensors lie where every processor can read them in place."""
    assert HEADER_BYTES % 8 == 0


@pytest.mark.parametrize("bit", [0x01, 0x20, 0x80])
def test_no_byte_of_the_header_can_change(bit: int) -> None:
    """Every single header byte, changed in one bit, makes the checkpoint useless."""
    for position in range(HEADER_BYTES):
        damaged = bytearray(BLOB)
        damaged[position] ^= bit
        rejection(bytes(damaged))


@given(position=st.integers(HEADER_BYTES, len(BLOB) - 1), mask=st.integers(1, 255))
def test_no_byte_of_the_payload_can_change(position: int, mask: int) -> None:
    """Any changed payload byte is found by the digest."""
    damaged = bytearray(BLOB)
    damaged[position] ^= mask
    assert rejection(bytes(damaged)) == "digest"


@given(length=st.integers(0, len(BLOB) - 1))
def test_nothing_can_be_cut_off(length: int) -> None:
    """A checkpoint that ends early is rejected, wherever it ends."""
    assert rejection(BLOB[:length]) == "format"


@given(tail=st.binary(min_size=1, max_size=40))
def test_nothing_can_be_added(tail: bytes) -> None:
    """A checkpoint that goes on after its end is rejected."""
    assert rejection(BLOB + tail) == "format"


@given(blob=st.binary(max_size=300))
def test_rubbish_is_no_checkpoint(blob: bytes) -> None:
    """Arbitrary bytes are rejected and never raise anything else."""
    assert rejection(blob) == "format"


@given(header=st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists) | st.text())
def test_a_header_of_any_json_is_no_checkpoint(header: object) -> None:
    """Valid JSON that is not ours is rejected and never raises anything else."""
    text = json.dumps(header).encode()
    assert rejection(struct.pack("<Q", len(text)) + text + BLOB[HEADER_BYTES:]) == "format"


def with_metadata(**changes: object) -> bytes:
    """Return BLOB with other metadata, length adjusted, as a forger would write it."""
    header = json.loads(BLOB[8:HEADER_BYTES])
    header["__metadata__"] |= changes
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + BLOB[HEADER_BYTES:]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": "other"}, "format"),
        ({"format_version": "2"}, "version"),
        ({"fingerprint": "cd" * 32}, "fingerprint"),
        ({"generation": "6"}, "layout"),
        ({"layout": "key_value"}, "layout"),
        ({"tensors": "wkv:F32[2,2,4,4]"}, "layout"),
        ({"num_tokens": "322"}, "chain"),
        ({"chain": "00" * 16}, "chain"),
        ({"digest": "00" * 32}, "digest"),
        ({"num_tokens": 321}, "chain"),
        ({"digest": None}, "digest"),
        ({"note": "hello"}, "format"),
    ],
)
def test_the_reason_names_what_differs(changes: dict[str, object], reason: str) -> None:
    """A checkpoint says what it is; each statement that is not the wanted one has its label."""
    assert rejection(with_metadata(**changes)) == reason


def test_only_the_canonical_header_is_accepted() -> None:
    """The same statements written with other white space are not what we wrote."""
    assert rejection(with_metadata()) == "format"


def test_a_deeply_nested_header_is_rejected() -> None:
    """JSON that would exhaust the parser's stack is no checkpoint."""
    text = b"[" * 100_000
    assert rejection(struct.pack("<Q", len(text)) + text) == "format"


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (replace(SPEC, fingerprint="ef" * 32), "fingerprint"),
        (replace(SPEC, layout="key_value"), "layout"),
        (replace(SPEC, tensors=SPEC.tensors[::-1]), "layout"),
        (replace(SPEC, tensors=(TensorSpec("wkv", (2, 4, 2, 4), torch.float32), SPEC.tensors[1])), "layout"),
        (replace(SPEC, tensors=(TensorSpec("wkv", (2, 2, 4, 4), torch.float16), SPEC.tensors[1])), "layout"),
    ],
    ids=["other weights", "orientation", "order", "heads", "precision"],
)
def test_a_state_of_another_model_is_rejected(spec: StateSpec, reason: str) -> None:
    """A state is only for the model that made it, even where another's has as many bytes."""
    assert rejection(BLOB, spec=spec) == reason


@pytest.mark.parametrize(
    "wanted",
    [
        CheckpointRef(checkpoint_id="x", num_tokens=320, chain=CHAIN),
        CheckpointRef(checkpoint_id="x", num_tokens=321, chain=bytes(16)),
        StateSource(num_tokens=0, chain=CHAIN),
    ],
)
def test_a_state_of_another_history_is_rejected(wanted: CheckpointRef | StateSource) -> None:
    """A sound checkpoint of other tokens, or of another tenant, is as useless as a damaged one."""
    assert rejection(BLOB, wanted=wanted) == "chain"


def test_encoding_refuses_tensors_that_are_not_the_specs() -> None:
    """A checkpoint that nobody could decode is not written."""
    state = make_state()
    wrong = replace(state, tensors=state.tensors | {"shift": torch.zeros(2, 2, 9)})
    with pytest.raises(ValueError, match="not those of its spec"):
        encode_state(wrong, SPEC)


def test_views_of_a_larger_tensor_are_encoded_as_what_they_show() -> None:
    """Tensors saved from a pool are views into one block; strides do not matter."""
    state = make_state()
    wide = torch.zeros(2, 2, 16)
    wide[..., ::2] = state.tensors["shift"]
    strided = replace(state, tensors=state.tensors | {"shift": wide[..., ::2]})
    assert bytes(encode_state(strided, SPEC)) == BLOB
