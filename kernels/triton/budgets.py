"""The kernels as a 1.5B model launches them, and what each may cost on sm_90. Nothing may spill where it matters.

A budget is what was compiled, rounded up: more registers than that are a change somebody should have wanted.
`wide_accesses` are those of states, rows or weights that must move 16 bytes a thread. Beside int8 weights these are all
copies of all stages, so that a loop that is no longer pipelined is over its budget, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import triton.language as tl

from kernels.triton import hopper, linear, packed, projections, residual, sampling, shift_mix, sources, wkv7

C, F, H, N, V = 2048, 8192, 32, 64, 65536


@dataclass(frozen=True, slots=True)
class Budget:
    """What a kernel may cost."""

    registers: int
    wide_accesses: int
    tensor_cores: str | None = None  # the shape that must be among its instructions
    narrow_copies: int | None = None  # None: whatever there is
    bulk_copies: int = 0
    spilled_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Variant:
    """A kernel as it is launched."""

    kernel: Any
    types: Mapping[str, str]  # of its arguments, by name
    constants: Mapping[str, object]
    budget: Budget
    options: Mapping[str, object] = field(default_factory=dict)
    unaligned: tuple[str, ...] = ("T", "H", "eps", "num_rows")  # arguments that need not be multiples of 16


_PARAMETERS = ["ln_weight", "ln_bias", "mix", "k_k", "k_a", "r_k", "decay_bias", "rate_bias", "mix_bias"]
_OF_CHUNKS = ["by_state", "by_values", "carry", "added", "reads", "found"]
_FLOATS = dict.fromkeys(
    ["x", "sums", "x_out", "shift", "decay", "state", "hidden", *_PARAMETERS, *_OF_CHUNKS],
    "*fp32",
)
_OF_PRODUCTS = ["weight", "narrow", "mixes", "rkv", "others", "out", "embedding"]
_HALVES = dict.fromkeys(["r", "k", "v", "a", "gate", "v_first", "value_mix", *_OF_PRODUCTS], "*bf16")
_INDICES = dict.fromkeys(["slots", "starts", "rows", "token_ids"], "*i64")
_SCALARS = {"state_stride": "i64", "shift_stride": "i64", "C": "i32", "H": "i32", "T": "i32", "num_rows": "i32"}
_TYPES = {**_FLOATS, **_HALVES, **_INDICES, **_SCALARS, "eps": "fp32"}
_RANKS = {"DECAY": 128, "RATE": 128, "GATE": 256, "VALUE": 128}  # padded
_SIZES = {"fp32": 4, "bf16": 2, "i8": 1}
_POINTERS = {"fp32": "*fp32", "bf16": "*bf16", "i8": "*i32"}  # int8 weights are read in words

_STEP = {"N": N, "HAS_VALUE_MIX": True, "IS_MIXED": False}
_STEP_OPTIONS = {"num_warps": wkv7.STEP_WARPS, "enable_fp_fusion": wkv7.FP_FUSION}
_CHUNK = {"ROWS": 16, "N": N, "L": wkv7.CHUNK_LEN}
_PARTS = {"SPLIT": 4, "C": C, "WIDTH": C, "BLOCK": 256}
_SIX, _ONE = {"M": 6, "M_PADDED": 8}, {"M": 1, "M_PADDED": 1}
_PARTS_OPTIONS = {"num_warps": shift_mix.NUM_WARPS, "enable_fp_fusion": shift_mix.FP_FUSION}


def _linear(
    outputs: int, inputs: int, dtype: str, num_rows: int, registers: int, wide: int, cores: str | None, activation: str
) -> Variant:
    itemsize = _SIZES[dtype]
    plan = packed.plan(outputs, inputs, itemsize)
    tile = linear.tile(num_rows, itemsize, plan.split)
    options = tile.options(num_rows, inputs // plan.split, plan.tile_k)
    has_sums = tile.is_side_by_side and plan.split > 1
    return Variant(
        linear.linear_kernel,
        {"x": "*bf16", "weight": _POINTERS[dtype], "bias": "*fp32", "T": "i32"}
        | {"out": "*fp32" if has_sums else "*bf16"},
        {
            "OUTPUTS": outputs,
            "K": inputs,
            "STRIDE": _stride(inputs, itemsize),
            "SPLIT": plan.split,
            "IS_SIDE_BY_SIDE": tile.is_side_by_side,
            "DTYPE": tl.float32 if dtype == "fp32" else tl.bfloat16,
            "TILE_K": plan.tile_k,
            "HAS_BIAS": activation != "none",
            "ACTIVATION": activation,
            **_constants(options),
        },
        Budget(registers, wide, cores),
        _launch(options),
    )


def _int8(outputs: int, inputs: int, num_rows: int, registers: int, cores: str, activation: str = "none") -> Variant:
    variant = _linear(outputs, inputs, "i8", num_rows, registers, 0, cores, activation)
    options: dict[str, Any] = {**variant.constants, **variant.options}
    return replace(variant, budget=Budget(registers, _copies(options, options["BLOCK_K"], 1), cores, narrow_copies=0))


def _copies(options: Mapping[str, Any], block_k: int, itemsize: int) -> int:
    """Count the 16-byte copies a thread begins before its loop and in it: weights of so many bytes, and rows."""
    of_stage = block_k * (options["BLOCK_O"] * itemsize + options["BLOCK_T"] * 2)
    return int(options["num_stages"] * of_stage // (32 * options["num_warps"] * 16))


def _stride(inputs: int, itemsize: int) -> int:
    tile_k = packed.plan(packed.PANEL, inputs, itemsize).tile_k
    return packed.PANEL * (inputs + (tile_k if itemsize == 1 else 0))


def _constants(options: Mapping[str, int]) -> dict[str, int]:
    return {name: value for name, value in options.items() if name.isupper()}


def _launch(options: Mapping[str, int]) -> dict[str, int]:
    return {name: value for name, value in options.items() if not name.isupper()}


def _project(num_rows: int, registers: int, cores: str, dtype: str = "bf16") -> Variant:
    options = projections.project_options(num_rows, C, _SIZES[dtype], 2)
    budget = Budget(registers, 4, cores)
    if dtype == "i8":
        of_each = _copies(options, options["WIDE_BLOCK_K"], 1), _copies(options, options["NARROW_BLOCK_K"], 2)
        budget = Budget(registers, sum(of_each), cores, narrow_copies=0)
    return Variant(
        projections.project_kernel,
        {**_TYPES, "wide": _POINTERS[dtype]},
        {"C": C, "WIDE": C, "WIDE_STRIDE": _stride(C, _SIZES[dtype]), **_RANKS, "DTYPE": tl.bfloat16}
        | _constants(options),
        budget,
        _launch(options),
    )


def _raise(num_rows: int, registers: int, cores: str) -> Variant:
    options = projections.raise_options(num_rows, 2)
    return Variant(
        projections.raise_kernel,
        _TYPES,
        {"C": C, **_RANKS, "DTYPE": tl.bfloat16} | _constants(options),
        Budget(registers, 4, cores),
        _launch(options),
    )


def _brick(*sizes: int) -> str:
    """Return the type of a matrix of which the copy engine takes bricks."""
    return f"tensordesc<bf16{list(sizes)},{hopper.layout_of(len(sizes))!r}>"


def _operands(tile: hopper.Tile, rows: str, weights: str) -> dict[str, str]:
    return {
        rows: _brick(tile.step, tile.block_t, hopper.TILE_K),
        weights: _brick(tile.block_o // packed.PANEL, tile.step, packed.PANEL, hopper.TILE_K),
    }


def _on_hopper(
    kernel: Any, types: Mapping[str, str], constants: Mapping[str, object], tile: hopper.Tile, budget: Budget
) -> Variant:
    options: dict[str, Any] = tile.options()
    return Variant(kernel, {**_TYPES, **types}, {**constants, **_constants(options)}, budget, _launch(options))


def _hopper_linear(outputs: int, inputs: int, num_rows: int, registers: int, cores: str, split: int = 1) -> Variant:
    is_side_by_side = num_rows <= linear.MAX_ROWS_SIDE_BY_SIDE
    of_program = inputs // split if is_side_by_side else inputs
    tile = hopper.tile(num_rows, 1 if is_side_by_side else split)
    types = {**_operands(tile, "rows", "weights"), "bias": "*fp32"}
    types["out"] = "*fp32" if is_side_by_side and split > 1 else "*bf16"
    constants: dict[str, object] = {"OUTPUTS": outputs, "K": inputs, "SPLIT": split}
    constants |= {"IS_SIDE_BY_SIDE": is_side_by_side}
    constants |= {"HAS_BIAS": False, "ACTIVATION": "none" if split > 1 else "relu_squared"}
    constants |= tile.streaming()
    return _on_hopper(hopper.linear_kernel, types, constants, tile, _streaming(tile, of_program, registers, cores))


def _hopper_project(num_rows: int, registers: int, cores: str, spilled_bytes: int = 0) -> Variant:
    tile = hopper.tile(num_rows)
    types = {**_operands(tile, "mixes", "weights"), "hidden": "*bf16"}
    constants = {"C": C, "WIDE": C, **_RANKS, **tile.streaming()}
    budget = replace(_streaming(tile, C, registers, cores), spilled_bytes=spilled_bytes)
    return _on_hopper(hopper.project_kernel, types, constants, tile, budget)


def _streaming(tile: hopper.Tile, inputs: int, registers: int, cores: str) -> Budget:
    """Two bricks a stage asked for before the loop, and in it, if there are more stages than that."""
    num_stages = inputs // (tile.step * hopper.TILE_K)
    bricks = 2 * min(tile.stages, num_stages) + (2 if num_stages > tile.stages else 0)
    return Budget(registers, 1, cores, bulk_copies=bricks)


def _hopper_raise(num_rows: int, registers: int, cores: str, gate: int = _RANKS["GATE"]) -> Variant:
    ranks = {**_RANKS, "GATE": gate}
    tile = hopper.raise_tile(num_rows, hopper.most_inputs(ranks))
    types = {"hidden": _brick(tile.block_t, hopper.TILE_K), "weights": _brick(tile.block_o, hopper.TILE_K)}
    # Of the four products: their weights, their rows, and the decay's rows again.
    bricks = (2 * sum(ranks.values()) + ranks["DECAY"]) // hopper.TILE_K
    budget = Budget(registers, 4, cores, bulk_copies=bricks)
    return _on_hopper(hopper.raise_kernel, types, {"C": C, **ranks}, tile, budget)


_BLOCK = {"BLOCK": sampling.BLOCK}
_LIST = {"CANDIDATES": sampling.CANDIDATES}
_BLOCKS = {**_BLOCK, "NUM_BLOCKS": V // sampling.BLOCK}
_OF_ROW = {"NUM_SURVEYED": V // sampling.BLOCK, "NUM_BLOCKS": V // sampling.WEIGHED["BLOCK"]}
_WEIGHED = {**_OF_ROW, **_constants(sampling.WEIGHED)}

VARIANTS: Mapping[str, Variant] = {
    "wkv7 step": Variant(wkv7.step_kernel, _TYPES, _STEP, Budget(128, 8), _STEP_OPTIONS),
    "wkv7 step, float16 state": Variant(
        wkv7.step_kernel, {**_TYPES, "state": "*fp16"}, _STEP, Budget(128, 4), _STEP_OPTIONS
    ),
    **{
        f"wkv7 {name}, {precision}": Variant(
            kernel,
            _TYPES,
            {**_CHUNK, **constants, "PRECISION": precision},
            Budget(registers, 8),
            {"num_warps": warps, "maxnreg": registers},
        )
        for precision, of_chunks, of_solving in (wkv7.OF_FLOAT32, wkv7.OF_16_BITS)
        for name, kernel, constants, warps, registers in (
            ("solve", wkv7.solve_kernel, {"HAS_VALUE_MIX": True}, of_chunks, of_solving),
            ("prepare", wkv7.prepare_kernel, {"HAS_VALUE_MIX": True}, of_chunks, 255),
            ("scan", wkv7.scan_kernel, {"BLOCK": wkv7.SCAN_ROWS, "STAGES": wkv7.SCAN_STAGES}, wkv7.SCAN_WARPS, 255),
        )
    },
    **{
        f"wkv7 scan, {precision}, float16 state": Variant(
            wkv7.scan_kernel,
            {**_TYPES, "state": "*fp16"},
            {**_CHUNK, "BLOCK": wkv7.SCAN_ROWS, "STAGES": wkv7.SCAN_STAGES, "PRECISION": precision},
            Budget(255, 8),
            {"num_warps": wkv7.SCAN_WARPS},
        )
        for precision, *_ in (wkv7.OF_FLOAT32, wkv7.OF_16_BITS)
    },
    "wkv7 finish": Variant(
        wkv7.finish_kernel, _TYPES, {**_CHUNK, "HAS_VALUE_MIX": True}, Budget(160, 8), {"num_warps": wkv7.FINISH_WARPS}
    ),
    "shift_mix step, six mixes": Variant(
        shift_mix.step_kernel, _TYPES, {**_PARTS, **_SIX}, Budget(64, 13), _PARTS_OPTIONS
    ),
    "shift_mix step, one mix": Variant(
        shift_mix.step_kernel, _TYPES, {**_PARTS, **_ONE}, Budget(56, 10), _PARTS_OPTIONS
    ),
    "shift_mix prefill": Variant(
        shift_mix.prefill_kernel,
        _TYPES,
        {**_PARTS, "SPLIT": 1, **_SIX, "ROWS": 1024, "TOKENS": shift_mix.MOST_TOKENS, "BLOCK": 1024},
        Budget(128, 22),
        _PARTS_OPTIONS,
    ),
    "embed": Variant(
        residual.embed_kernel, {**_TYPES, "out": "*fp32"}, {"C": C, "WIDTH": C}, Budget(64, 4), _PARTS_OPTIONS
    ),
    "gather": Variant(
        residual.gather_kernel,
        {**_TYPES, "out": "*fp32"},
        {"C": C, "SPLIT": 4, "BLOCK": residual.GATHER_BLOCK},
        Budget(48, 4),
        _PARTS_OPTIONS,
    ),
    "norm": Variant(
        residual.norm_kernel,
        _TYPES,
        {"C": C, "WIDTH": C, "SPLIT": 4, "IS_GATHERED": True},
        Budget(64, 4),
        _PARTS_OPTIONS,
    ),
    "consumed": Variant(
        sources.consumed_kernel,
        dict.fromkeys(["sources", "last_sampled", "ids_out", "slots_out", "last_out"], "*i64")
        | {**_TYPES, "stop_ids": "*i32", "R": "i32"},
        {"STOPS": 8, "BLOCK": sources.BLOCK},
        Budget(64, 1),
        {"num_warps": 4},
        unaligned=("T", "R"),
    ),
    "project, 1 row": _project(1, 112, "m64n16k16"),
    "project, 32 rows": _project(32, 120, "m64n32k16"),
    "project, 256 rows": _project(256, 168, "m64n128k16"),
    "project, 2048 rows": _project(2048, 240, "m64n256k16"),
    "project int8, 1 row": _project(1, 120, "m64n16k16", "i8"),
    "project int8, 32 rows": _project(32, 136, "m64n32k16", "i8"),
    "project int8, 64 rows": _project(64, 136, "m64n64k16", "i8"),
    "project int8, 256 rows": _project(256, 168, "m64n128k16", "i8"),
    "project int8, 2048 rows": _project(2048, 168, "m64n128k16", "i8"),
    "hopper project, 1 row": _hopper_project(1, 40, "m64n8k16"),
    "hopper project, 32 rows": _hopper_project(32, 64, "m64n32k16"),
    "hopper project, 256 rows": _hopper_project(256, 192, "m64n128k16"),
    # What few programs store of low-rank products, after all sums: they wait for nobody.
    "hopper project, 2048 rows": _hopper_project(2048, 255, "m64n256k16", spilled_bytes=272),
    "hopper raise, 1 row": _hopper_raise(1, 40, "m64n8k16"),
    "hopper raise, 32 rows": _hopper_raise(32, 56, "m64n32k16"),
    "hopper raise, 2048 rows": _hopper_raise(2048, 144, "m64n128k16"),
    "hopper raise of 768, 2048 rows": _hopper_raise(2048, 112, "m64n64k16", gate=hopper.MAX_RANK),
    "hopper linear C x C, 1 row": _hopper_linear(C, C, 1, 40, "m64n8k16", split=4),
    "hopper linear F x C, 1 row": _hopper_linear(F, C, 1, 40, "m64n8k16"),
    "hopper linear F x C, 16 rows": _hopper_linear(F, C, 16, 40, "m64n16k16"),
    "hopper linear F x C, 32 rows": _hopper_linear(F, C, 32, 48, "m64n32k16"),
    "hopper linear F x C, 64 rows": _hopper_linear(F, C, 64, 72, "m64n64k16"),
    "hopper linear F x C, 256 rows": _hopper_linear(F, C, 256, 112, "m64n128k16"),
    "hopper linear C x F, 256 rows": _hopper_linear(C, F, 256, 112, "m64n128k16", split=4),
    "hopper linear C x F, 512 rows": _hopper_linear(C, F, 512, 176, "m64n256k16", split=4),
    "hopper linear F x C, 2048 rows": _hopper_linear(F, C, 2048, 176, "m64n256k16"),
    "hopper linear C x F, 2048 rows": _hopper_linear(C, F, 2048, 160, "m64n128k16", split=4),
    "raise, 16 rows": _raise(16, 96, "m64n16k16"),
    "raise, 64 rows": _raise(64, 168, "m64n64k16"),
    "linear C x C, 1 row": _linear(C, C, "bf16", 1, 56, 4, "m64n16k16", "none"),
    "linear C x C, 32 rows": _linear(C, C, "bf16", 32, 64, 4, "m64n32k16", "none"),
    "linear C x C, 64 rows": _linear(C, C, "bf16", 64, 96, 4, "m64n64k16", "none"),
    "linear C x C, 256 rows": _linear(C, C, "bf16", 256, 160, 4, "m64n128k16", "none"),
    "linear C x C, 2048 rows": _linear(C, C, "bf16", 2048, 216, 4, "m64n128k16", "none"),
    "linear F x C, 1 row": _linear(F, C, "bf16", 1, 96, 4, "m64n16k16", "none"),
    "linear C x F, 1 row": _linear(C, F, "bf16", 1, 96, 4, "m64n16k16", "none"),
    "linear V x C, 1 row": _linear(V, C, "bf16", 1, 96, 4, "m64n16k16", "none"),
    "linear C x C int8, 1 row": _int8(C, C, 1, 80, "m64n16k16"),
    "linear C x C int8, 32 rows": _int8(C, C, 32, 96, "m64n32k16"),
    "linear C x C int8, 64 rows": _int8(C, C, 64, 128, "m64n64k16"),
    "linear C x C int8, 256 rows": _int8(C, C, 256, 168, "m64n128k16"),
    "linear C x C int8, 2048 rows": _int8(C, C, 2048, 255, "m64n128k16"),
    "linear F x C int8, 1 row": _int8(F, C, 1, 80, "m64n16k16", "relu_squared"),
    "linear F x C int8, 2048 rows": _int8(F, C, 2048, 168, "m64n128k16", "relu_squared"),
    "linear C x F int8, 1 row": _int8(C, F, 1, 80, "m64n16k16"),
    "linear V x C int8, 1 row": _int8(V, C, 1, 80, "m64n16k16"),
    "linear V x C int8, 256 rows": _int8(V, C, 256, 168, "m64n128k16"),
    "linear of narrow tiles int8, 1 row": _int8(960, 960, 1, 80, "m64n16k16"),
    "low rank down, 1 row": _linear(96, C, "bf16", 1, 48, 4, "m64n16k16", "none"),
    "low rank up, 1 row": _linear(C, 96, "bf16", 1, 40, 4, "m64n16k16", "sigmoid"),
    "decay down, 1 row": _linear(96, C, "fp32", 1, 200, 4, None, "none"),
    "decay up, 1 row": _linear(C, 96, "fp32", 1, 200, 4, None, "sigmoid"),
    "decay down, 2048 rows": _linear(96, C, "fp32", 2048, 255, 4, None, "none"),
    "linear, spans added": Variant(
        linear.add_spans_kernel,
        {"sums": "*fp32", "bias": "*fp32", "out": "*bf16", "T": "i32"},
        {"OUTPUTS": C, "SPLIT": 4, "HAS_BIAS": True, "ACTIVATION": "tanh", "BLOCK_O": linear.ADD_BLOCK},
        Budget(32, 4),
        {"num_warps": linear.ADD_WARPS},
    ),
    **{
        f"sample, {name}": Variant(
            kernel,
            {"logits": "*fp32", "temperature": "*fp32", "top_k": "*i32", "top_p": "*fp64", "min_p": "*fp32"}
            | {"uniform": "*fp64", "out": "*i64", "stride": "i64", "greatest": "*fp32", "ids": "*i32"}
            | {
                "is_broken": "*i32",
                "slots": "*i64",
                "counts": "*i32",
                "masses": "*fp32",
                "candidates": "*i32",
                "cutoffs": "*i32",
            }
            | {
                "sums": "*fp64",
                "num_blocks": "i32",
                "num_surveyed": "i32",
                "num_rows": "i32",
                "totals": "*fp32",
                "num_candidates": "*i32",
            },
            {"V": V, **constants},
            Budget(registers, wide),
            {"num_warps": warps},
        )
        for name, kernel, constants, registers, wide, warps in [
            ("survey", sampling.survey_kernel, _BLOCK, 40, 2, sampling.NUM_WARPS),
            ("weigh", sampling.weigh_kernel, {**_WEIGHED, "TABLE": 0}, 128, 2, sampling.WEIGHED["num_warps"]),
            ("weigh again", sampling.weigh_kernel, {**_WEIGHED, "TABLE": 2}, 128, 2, sampling.WEIGHED["num_warps"]),
            ("collect", sampling.collect_kernel, {**_WEIGHED, **_LIST}, 96, 2, sampling.WEIGHED["num_warps"]),
            (
                "cut",
                sampling.cut_kernel,
                {**_OF_ROW, **_LIST, "PIECE": sampling.PIECE},
                240,
                0,
                sampling.CUT_WARPS,
            ),
            ("add", sampling.add_kernel, _BLOCKS, 64, 2, sampling.NUM_WARPS),
            ("pick", sampling.pick_kernel, {**_BLOCKS, "HAS_SLOTS": True}, 96, 2, sampling.NUM_WARPS),
        ]
    },
}
