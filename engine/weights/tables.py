"""Which tensors a model of each generation consists of, as a table; and a file checked against its table.

A row says: name, shape in letters, and how the engine keeps the tensor. Every dimension is inferred from the file: a
letter's value is the one most tensors agree on, so a misshapen tensor is blamed itself and not its neighbours. Letters
are those of `kernels/README.md`; `Dw Da Dv Dg` are the low-rank widths, inferred for each layer by itself.
"""

from __future__ import annotations

import enum
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from engine.errors import ModelFileError


class Keep(enum.Enum):
    """How the engine keeps a tensor."""

    MATRIX = enum.auto()  # in the model's dtype, as it is
    TRANSPOSED = enum.auto()  # in the model's dtype, rows and columns swapped: official low-rank pairs are [in, out]
    EXACT = enum.auto()  # float32, as it is: small, and read element by element
    EXACT_TRANSPOSED = enum.auto()  # float32, swapped: the low-rank decay, which 16 bits would spoil


class Layers(enum.Enum):
    """Which layers have a tensor."""

    ALL = enum.auto()
    FIRST = enum.auto()
    LATER = enum.auto()  # the first may carry one too, unused: official files do, others don't


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of tensor. `*` in the name stands for the layer. Leading dimensions of 1 in a file are ignored."""

    name: str
    shape: str
    keep: Keep
    layers: Layers = Layers.ALL


_RWKV7 = (
    Row("emb.weight", "V C", Keep.MATRIX),
    Row("blocks.*.ln0.weight", "C", Keep.EXACT, Layers.FIRST),
    Row("blocks.*.ln0.bias", "C", Keep.EXACT, Layers.FIRST),
    Row("blocks.*.ln1.weight", "C", Keep.EXACT),
    Row("blocks.*.ln1.bias", "C", Keep.EXACT),
    Row("blocks.*.ln2.weight", "C", Keep.EXACT),
    Row("blocks.*.ln2.bias", "C", Keep.EXACT),
    *(Row(f"blocks.*.att.x_{letter}", "C", Keep.EXACT) for letter in "rwkvag"),
    Row("blocks.*.att.w0", "C", Keep.EXACT),
    Row("blocks.*.att.w1", "C Dw", Keep.EXACT_TRANSPOSED),
    Row("blocks.*.att.w2", "Dw C", Keep.EXACT_TRANSPOSED),
    Row("blocks.*.att.a0", "C", Keep.EXACT),
    Row("blocks.*.att.a1", "C Da", Keep.TRANSPOSED),
    Row("blocks.*.att.a2", "Da C", Keep.TRANSPOSED),
    Row("blocks.*.att.v0", "C", Keep.EXACT, Layers.LATER),
    Row("blocks.*.att.v1", "C Dv", Keep.TRANSPOSED, Layers.LATER),
    Row("blocks.*.att.v2", "Dv C", Keep.TRANSPOSED, Layers.LATER),
    Row("blocks.*.att.g1", "C Dg", Keep.TRANSPOSED),
    Row("blocks.*.att.g2", "Dg C", Keep.TRANSPOSED),
    Row("blocks.*.att.k_k", "C", Keep.EXACT),
    Row("blocks.*.att.k_a", "C", Keep.EXACT),
    Row("blocks.*.att.r_k", "H N", Keep.EXACT),
    Row("blocks.*.att.receptance.weight", "C C", Keep.MATRIX),
    Row("blocks.*.att.key.weight", "C C", Keep.MATRIX),
    Row("blocks.*.att.value.weight", "C C", Keep.MATRIX),
    Row("blocks.*.att.output.weight", "C C", Keep.MATRIX),
    Row("blocks.*.att.ln_x.weight", "C", Keep.EXACT),
    Row("blocks.*.att.ln_x.bias", "C", Keep.EXACT),
    Row("blocks.*.ffn.x_k", "C", Keep.EXACT),
    Row("blocks.*.ffn.key.weight", "F C", Keep.MATRIX),
    Row("blocks.*.ffn.value.weight", "C F", Keep.MATRIX),
    Row("ln_out.weight", "C", Keep.EXACT),
    Row("ln_out.bias", "C", Keep.EXACT),
    Row("head.weight", "V C", Keep.MATRIX),
)

TABLES: Mapping[str, tuple[Row, ...]] = {"7": _RWKV7}

# Tested in this order; the first name that is in the file decides. Sources: RWKV-LM, ChatRWKV, web-rwkv.
_GENERATION_SIGNS = (
    ("_strategy", None, "it was converted by the `rwkv` package for one device; use the original .pth"),
    ("blocks.0.ffn.enn.weight", None, "it is RWKV-8, which is not supported"),
    ("blocks.0.qkv.qq.weight", None, "it is RWKV-7b (DeepEmbed attention, a growing cache), which is not supported"),
    ("blocks.0.ffn.s_emb.weight", None, "it is RWKV-7a (DeepEmbed), which is not supported"),
    (
        "model.layers.0.attn.r_k",
        None,
        "its names are the Hugging Face conversion's; use a file with the official names",
    ),
    ("model.blocks.0.att.r_k", None, "its names are the Hugging Face conversion's; use a file with the official names"),
    ("blocks.0.att.r_k", "7", ""),
    ("blocks.0.att.time_maa_x", None, "it is RWKV-6, which is not supported yet"),
    ("blocks.0.att.time_mix_w1", None, "it is RWKV-6, which is not supported yet"),
    ("blocks.0.att.ln_x.weight", None, "it is RWKV-5, which is not supported yet"),
    ("blocks.0.att.time_first", None, "it is RWKV-4, which is not supported yet"),
)


@dataclass(frozen=True, slots=True)
class CheckedWeights:
    """Tensors that fit a generation's table, as they lie in the file, and the dimensions they agree on."""

    generation: str
    num_layers: int
    dimensions: Mapping[str, int]  # C, F, H, N, V
    tensors: Mapping[str, torch.Tensor]  # without leading dimensions of 1, unused ones left out
    rows: Mapping[str, Row]

    def prepared(self, name: str, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """Return the tensor as the engine keeps it. Always a copy: a mapped file may change under our feet."""
        tensor, keep = self.tensors[name], self.rows[name].keep
        if keep in (Keep.TRANSPOSED, Keep.EXACT_TRANSPOSED):
            tensor = tensor.t()
        if keep in (Keep.EXACT, Keep.EXACT_TRANSPOSED):
            dtype = torch.float32
        return tensor.to(device=device, dtype=dtype, copy=True, memory_format=torch.contiguous_format)


def check_weights(path: str, tensors: Mapping[str, torch.Tensor]) -> CheckedWeights:
    """Return `tensors` as a known generation's weights; raises `ModelFileError` with every problem at once."""
    generation = _generation(path, tensors)
    num_layers = 1 + max(int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name)))
    rows, unused = _expand(TABLES[generation], num_layers)
    missing = [f"{name}: missing, {_article(row)} expected" for name, row in rows.items() if name not in tensors]
    unexpected = [f"{name}: not part of RWKV-{generation}" for name in sorted(tensors) if name not in rows | unused]
    present = {name: _without_leading_ones(tensors[name], row) for name, row in rows.items() if name in tensors}
    dimensions = _infer_dimensions(present, rows)
    problems = missing + unexpected + list(_misfits(present, rows, dimensions))
    if not problems and dimensions["C"] != dimensions["H"] * dimensions["N"]:
        problems.append(f"width {dimensions['C']} is not heads x head size = {dimensions['H']} x {dimensions['N']}")
    if problems:
        raise ModelFileError(path, problems)
    sizes = {letter: size for letter, size in dimensions.items() if len(letter) == 1}
    return CheckedWeights(generation, num_layers, sizes, present, rows)


def _generation(path: str, tensors: Mapping[str, torch.Tensor]) -> str:
    for sign, generation, refusal in _GENERATION_SIGNS:
        if sign in tensors:
            if generation is None:
                raise ModelFileError(path, [refusal])
            return generation
    raise ModelFileError(path, [f"it is no RWKV model: none of its {len(tensors)} names is known"])


def _expand(table: tuple[Row, ...], num_layers: int) -> tuple[dict[str, Row], dict[str, Row]]:
    """Return the rows by full name: those that must be there, and those that may be there unused."""
    required: dict[str, Row] = {}
    unused: dict[str, Row] = {}
    for row in table:
        if "*" not in row.name:
            required[row.name] = row
            continue
        for layer in range(num_layers):
            name = row.name.replace("*", str(layer))
            if row.layers is Layers.ALL or (row.layers is Layers.FIRST) == (layer == 0):
                required[name] = row
            elif row.layers is Layers.LATER:
                unused[name] = row
    return required, unused


def _without_leading_ones(tensor: torch.Tensor, row: Row) -> torch.Tensor:
    while tensor.dim() > len(row.shape.split()) and tensor.shape[0] == 1:
        tensor = tensor[0]
    return tensor


def _letters(name: str, row: Row) -> list[str]:
    """Return the row's letters; those of low-rank widths carry the layer, because each layer has its own."""
    layer = name.split(".")[1]
    return [f"{letter}.{layer}" if letter.startswith("D") else letter for letter in row.shape.split()]


def _infer_dimensions(tensors: Mapping[str, torch.Tensor], rows: Mapping[str, Row]) -> dict[str, int]:
    votes: defaultdict[str, Counter[int]] = defaultdict(Counter)
    for name, tensor in tensors.items():
        letters = _letters(name, rows[name])
        if tensor.dim() == len(letters):
            for letter, size in zip(letters, tensor.shape, strict=True):
                votes[letter][size] += 1
    return {letter: counter.most_common(1)[0][0] for letter, counter in votes.items()}


def _misfits(
    tensors: Mapping[str, torch.Tensor], rows: Mapping[str, Row], dimensions: Mapping[str, int]
) -> Iterator[str]:
    for name, tensor in tensors.items():
        expected = tuple(dimensions.get(letter, 0) for letter in _letters(name, rows[name]))
        if tuple(tensor.shape) != expected:
            yield f"{name}: shape {tuple(tensor.shape)}, expected [{rows[name].shape}] = {expected}"
        elif not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
            yield f"{name}: dtype {tensor.dtype}, expected float32, bfloat16 or float16"
        elif not torch.isfinite(tensor.sum(dtype=torch.float32)):  # one pass, and no copy of the tensor
            yield f"{name}: holds NaN or infinite values"


def _article(row: Row) -> str:
    return f"[{row.shape}]"
