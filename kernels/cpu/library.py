"""The compiled library as Python sees it: the structures of `src/sostenuto.h`, and how a tensor becomes one.

Nothing is checked on the other side of the border, so everything is checked here or guaranteed by `operators`.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_char_p, c_double, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

import torch

FORMATS = {torch.float32: 0, torch.bfloat16: 1}
WEIGHT_FORMATS = FORMATS | {torch.int8: 2}
STATE_FORMATS = {torch.float32: 0, torch.float16: 3}
ACTIVATIONS = {"none": 0, "tanh": 1, "sigmoid": 2, "relu_squared": 3}


class Rows(Structure):
    """Row-major activations of one format."""

    _fields_ = [("data", c_void_p), ("stride", c_int64), ("format", c_int32)]


class Matrix(Structure):
    """Packed weights `[out, in]`."""

    _fields_ = [("data", c_void_p), ("out_features", c_int64), ("in_features", c_int64), ("format", c_int32)]


class LowRank(Structure):
    """Two packed matrices with what happens after each."""

    _fields_ = [
        ("down", Matrix),
        ("up", Matrix),
        ("bias", c_void_p),
        ("activation", c_int32),
        ("output_activation", c_int32),
    ]


class Batch(Structure):
    """Which tokens belong together, and which slot is theirs."""

    _fields_ = [("num_tokens", c_int64), ("num_sequences", c_int64), ("starts", c_void_p), ("slots", c_void_p)]


class Norm(Structure):
    """Scale, shift and epsilon of a normalisation."""

    _fields_ = [("weight", c_void_p), ("bias", c_void_p), ("eps", c_float)]


class States(Structure):
    """States of one kind in the pool."""

    _fields_ = [
        ("data", c_void_p),
        ("num_slots", c_int64),
        ("slot_stride", c_int64),
        ("layer_stride", c_int64),
        ("format", c_int32),
    ]


class Wkv7Parameters(Structure):
    """What the WKV-7 operator takes besides rows."""

    _fields_ = [
        ("num_heads", c_int64),
        ("head_size", c_int64),
        ("k_k", c_void_p),
        ("k_a", c_void_p),
        ("r_k", c_void_p),
        ("norm", Norm),
    ]


class Wkv7Rows(Structure):
    """The rows that the WKV-7 operator reads, and the one it writes."""

    _fields_ = [(name, Rows) for name in ("r", "k", "v", "decay", "a", "gate", "v_first", "value_mix", "y")]


class Rwkv7Layer(Structure):
    """Everything a layer of RWKV-7 is made of."""

    _fields_ = [
        ("ln1", Norm),
        ("ln2", Norm),
        ("att_mix", c_void_p),
        ("ffn_mix", c_void_p),
        ("receptance", Matrix),
        ("key", Matrix),
        ("value", Matrix),
        ("output", Matrix),
        ("decay", LowRank),
        ("rate", LowRank),
        ("gate", LowRank),
        ("value_mix", LowRank),
        ("wkv", Wkv7Parameters),
        ("ffn_key", Matrix),
        ("ffn_value", Matrix),
    ]


class Rwkv7Model(Structure):
    """A whole model."""

    _fields_ = [
        ("num_layers", c_int64),
        ("width", c_int64),
        ("vocab_size", c_int64),
        ("embedding", Rows),
        ("ln0", Norm),
        ("ln_out", Norm),
        ("layers", POINTER(Rwkv7Layer)),
        ("head", Matrix),
    ]


class SamplingRule(Structure):
    """How to draw from a row; several are a table of doubles."""

    _fields_ = [(name, c_double) for name in ("temperature", "top_k", "top_p", "min_p", "uniform")]


class Sampling(Structure):
    """Rows of logits, and for each how to draw."""

    _fields_ = [
        ("num_rows", c_int64),
        ("vocab_size", c_int64),
        ("stride", c_int64),
        ("logits", c_void_p),
        ("rules", c_void_p),
        ("token_ids", c_void_p),
    ]


class Logprobs(Structure):
    """Rows of logits, and what is to be reported of each."""

    _fields_ = [
        ("num_rows", c_int64),
        ("vocab_size", c_int64),
        ("stride", c_int64),
        ("logits", c_void_p),
        ("token_ids", c_void_p),
        ("num_top", c_int64),
        ("num_excluded", c_int64),
        ("excluded_ids", c_void_p),
        ("own", c_void_p),
        ("top", c_void_p),
        ("top_ids", c_void_p),
    ]


_CONSUMED = (c_void_p, POINTER(Rwkv7Model), POINTER(Batch), c_void_p, POINTER(States), POINTER(States))

_SIGNATURES = {
    "sostenuto_team_create": (c_void_p, [c_int32]),
    "sostenuto_team_destroy": (None, [c_void_p]),
    "sostenuto_team_poison": (None, [c_void_p]),
    "sostenuto_target": (c_char_p, []),
    "sostenuto_max_head_size": (c_int64, []),
    "sostenuto_packed_bytes": (c_int64, [c_int64, c_int64, c_int32]),
    "sostenuto_pack": (None, [c_void_p, POINTER(Rows), POINTER(Matrix)]),
    "sostenuto_linear": (None, [c_void_p, c_int64, POINTER(Rows), POINTER(Matrix), POINTER(Rows)]),
    "sostenuto_apply_low_rank": (None, [c_void_p, c_int64, POINTER(Rows), POINTER(LowRank), POINTER(Rows)]),
    "sostenuto_shift_mix": (
        None,
        [
            c_void_p,
            POINTER(Batch),
            POINTER(Rows),
            c_int64,
            POINTER(Norm),
            POINTER(States),
            c_void_p,
            c_int32,
            POINTER(Rows),
        ],
    ),
    "sostenuto_wkv7": (
        None,
        [c_void_p, POINTER(Batch), POINTER(Wkv7Parameters), POINTER(Wkv7Rows), POINTER(States)],
    ),
    "sostenuto_relu_squared": (None, [c_void_p, c_int64, c_int64, POINTER(Rows), POINTER(Rows)]),
    "sostenuto_sample": (None, [c_void_p, POINTER(Sampling)]),
    "sostenuto_report_logprobs": (None, [c_void_p, POINTER(Logprobs)]),
    "sostenuto_rwkv7_forward": (c_int32, [*_CONSUMED, c_int64, c_void_p, c_void_p]),
    "sostenuto_rwkv7_step": (c_int32, [*_CONSUMED, c_int64, c_void_p, c_void_p, c_void_p]),
    "sostenuto_rwkv7_logits": (None, [c_void_p, POINTER(Rwkv7Model), c_int64, POINTER(Rows), c_void_p]),
}


def load(path: Path) -> ctypes.CDLL:
    """Return the library at `path`, its functions with their signatures. Calls release the GIL."""
    library = ctypes.CDLL(str(path))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class Team:
    """A team of threads in the library, with the library: what every operator is called on."""

    def __init__(self, library: ctypes.CDLL, num_threads: int) -> None:
        self.library = library
        self.num_threads = num_threads
        self.handle = library.sostenuto_team_create(num_threads)
        if not self.handle:
            raise MemoryError(f"cannot start {num_threads} threads")
        self.target: str = library.sostenuto_target().decode()  # the instruction set the library was compiled for
        self.max_head_size: int = library.sostenuto_max_head_size()

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self.library.sostenuto_team_destroy(self.handle)

    def poison(self) -> None:
        """Fill the team's scratch memory with NaN; for tests."""
        self.library.sostenuto_team_poison(self.handle)


def rows(tensor: torch.Tensor | None) -> Rows:
    """Return `tensor[T, C]` of a known format with contiguous rows; None becomes absent rows."""
    if tensor is None:
        return Rows()
    assert tensor.dim() == 2
    assert tensor.stride(1) == 1 or tensor.shape[1] == 1
    return Rows(tensor.data_ptr(), tensor.stride(0), FORMATS[tensor.dtype])


def batch(slots: torch.Tensor, starts: torch.Tensor, num_tokens: int) -> Batch:
    """Return the packed sequences of a call; both tensors int64 and contiguous."""
    return Batch(num_tokens, slots.shape[0], starts.data_ptr(), slots.data_ptr())


def floats(tensor: torch.Tensor) -> int:
    """Return the address of a contiguous float32 parameter."""
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def sampling_rules(table: torch.Tensor, num_rows: int) -> int:
    """Return the address of the rules of so many rows."""
    assert table.shape == (num_rows, len(SamplingRule._fields_))
    assert table.dtype == torch.float64
    assert table.is_contiguous()
    return table.data_ptr()


def norm(weight: torch.Tensor, bias: torch.Tensor, eps: float) -> Norm:
    """Return a normalisation's parameters."""
    return Norm(floats(weight), floats(bias), eps)


def states(view: torch.Tensor, layers: bool = False) -> States:
    """Return a view `[S, ...]` of the pool, or `[S, L, ...]` with `layers`, contiguous inside a slot."""
    strides, sizes = view.stride(), view.shape
    assert strides[-1] == 1
    assert all([strides[i] == strides[i + 1] * sizes[i + 1] for i in range(1, len(sizes) - 1)])
    return States(view.data_ptr(), sizes[0], strides[0], strides[1] if layers else 0, STATE_FORMATS[view.dtype])
