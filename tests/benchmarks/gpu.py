"""`make bench-gpu`: what one card does. The last line is one JSON object.

Sections: ceilings of the card; correctness on it; decode by batch size; prompts; int8 weights beside bfloat16 ones, and
float16 states beside float32 ones, in turn; a step and its context, beside a transformer of the size; the service;
then, in a process of its own because operators cannot be taken back from a device, plain PyTorch captured as ours is. A
section that fails says so in the result and the others run; each figure is printed when it is known, so that a run that
is cut off has said something. Kernels are compiled by many processes first. `--sections` chooses: the service is the
longest by far.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

import kernels
from engine.messages import SamplingParams
from engine.models.load import load_model
from engine.models.rwkv7 import RWKV7
from engine.runner.cuda_graphs import (
    CudaGraphs,
    DecodeGraphs,
    DecodeRow,
    DecodeStep,
    HostTable,
    RowTable,
    Size,
    rows_of,
    triton_step,
)
from engine.runner.input_batch import InputBatch
from engine.state.pool import StatePool
from engine.weights.synthetic import SyntheticShape, save_synthetic
from tests.benchmarks.gpu_service import measure_service
from tests.benchmarks.static_cache_transformer import StaticCacheTransformer


def _shape(num_layers: int, width: int, decay: int, rate: int, value: int, gate: int) -> SyntheticShape:
    return SyntheticShape(
        num_layers=num_layers, width=width, head_size=64, vocab_size=65536,
        decay_rank=decay, rate_rank=rate, value_rank=value, gate_rank=gate,
    )  # fmt: skip


SHAPES = {
    "0.1B": _shape(12, 768, 64, 64, 32, 128),
    "1.5B": _shape(24, 2048, 96, 96, 64, 256),
    "7.2B": _shape(32, 4096, 128, 128, 96, 480),
}
BATCH_SIZES = (1, 4, 8, 16, 32, 64, 128, 256, 384, 960)
CONTEXTS = (512, 2048, 8192, 32_768, 131_072)
PROMPTS = ((1, 512), (1, 1024), (1, 4096), (8, 1024), (32, 1024))
SLOT_SETS = 3  # disjoint states in turn: a card's cache must not hold what a step reads
PIECE = 2048  # tokens of a prompt consumed at once


COMPILED = (1, 32, 64, 256)  # batch sizes that between them have every variant of a kernel
SECTIONS = (
    "ceilings", "correctness", "decode", "prefill", "int8", "float16_states", "context", "context_transformer",
    "service", "pytorch",
)  # fmt: skip


def main() -> int:
    """Measure, print a line a section, print one JSON line."""
    options = _options()
    if not torch.cuda.is_available():
        print("bench-gpu needs a CUDA device, and PyTorch sees none here: nothing was measured.", file=sys.stderr)
        return 2
    if not kernels.triton_operators.is_available():
        print("bench-gpu needs Triton: pip install sostenuto[cuda]. Nothing was measured.", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    if options.compile:
        compile_for(options.compile, ensure_checkpoint(options.cache, options.main_shape, num_layers=2), device)
        return 0
    results: dict[str, object] = describe(device)
    plain = "pytorch" in options.sections and len(options.sections) == 1
    shapes = {*options.shapes, options.main_shape}
    paths = {name: ensure_checkpoint(options.cache, name) for name in shapes}
    if not plain:
        results["backend"] = kernels.select_backend(device)
        compile_everything(options)

    def section(name: str, measure: Callable[[], object]) -> None:
        if name not in options.sections:
            return
        started_at = time.perf_counter()
        try:
            with torch.inference_mode():
                results[name] = measure()
        except Exception as error:  # the others are still worth having
            results[name] = {"failed": f"{type(error).__name__}: {error}"}
        torch.cuda.empty_cache()
        print(f"{name} {time.perf_counter() - started_at:.0f} s: {json.dumps(results[name])}", flush=True)

    path = paths[options.main_shape]
    section("ceilings", lambda: ceilings(device))
    section("correctness", lambda: correctness(load_model(path, device, "bfloat16")))
    section("decode", lambda: {name: decode(paths[name], device, triton_step) for name in options.shapes})
    section("prefill", lambda: prefill(path, device))
    section("int8", lambda: int8_beside_bfloat16(path, device))
    section("float16_states", lambda: float16_states_beside_float32(load_model(path, device, "bfloat16")))
    section("context", lambda: by_context(path, device))
    section("context_transformer", lambda: transformer_by_context(device))
    with tempfile.TemporaryDirectory(prefix="sostenuto-bench-") as directory:
        section("service", lambda: measure_service(path, Path(directory)))
    if plain:
        section("pytorch", lambda: {"decode": decode(path, device, plain_step), "prefill": prefill(path, device)})
    else:
        section("pytorch", lambda: _in_another_process(options))
    print(json.dumps(results))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gpu", description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path("build/bench"), help="where generated checkpoints are kept")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["1.5B"], help="of the section decode")
    parser.add_argument("--main-shape", choices=SHAPES, default="1.5B", help="of all other sections")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--compile", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def compile_everything(options: argparse.Namespace) -> None:
    """Let a process for each of a few steps compile what it runs, all at once: Triton keeps it on disk."""
    command = [sys.executable, "-m", "tests.benchmarks.gpu", "--cache", str(options.cache)]
    command += ["--main-shape", options.main_shape, "--compile"]
    ensure_checkpoint(options.cache, options.main_shape, num_layers=2)
    started_at = time.perf_counter()
    wanted = [*(f"decode {rows}" for rows in COMPILED), "prefill 1024"]
    dtypes = ("bfloat16", "int8") if "int8" in options.sections else ("bfloat16",)
    wanted = [f"{what} {dtype}" for dtype in dtypes for what in wanted]
    processes = [subprocess.Popen([*command, what]) for what in wanted[: os.cpu_count()]]
    failed = [what for what, process in zip(wanted, processes, strict=False) if process.wait()]
    print(f"compiled in {time.perf_counter() - started_at:.0f} s{f', but not {failed}' if failed else ''}", flush=True)


def compile_for(what: str, path: Path, device: torch.device) -> None:
    """Run one step, so that its kernels are compiled."""
    kernels.select_backend(device)
    kind, count, dtype = what.split()
    model = load_model(path, device, dtype)
    with torch.inference_mode():
        if kind == "prefill":
            consume(model, new_pool(model, 2), [0], int(count))
        else:
            table = new_table(int(count), 0, device)
            triton_step(model, new_pool(model, int(count) + 1), _no_ids(device))(table, _no_samples(device))
    torch.cuda.synchronize()


def _in_another_process(options: argparse.Namespace) -> object:
    command = [sys.executable, "-m", "tests.benchmarks.gpu", "--cache", str(options.cache)]
    command += ["--main-shape", options.main_shape, "--sections", "pytorch"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])["pytorch"]


def describe(device: torch.device) -> dict[str, object]:
    """Return card, driver, versions and commit."""
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "card": torch.cuda.get_device_name(device),
        "driver": driver,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "commit": _output("git", "describe", "--always", "--dirty", "--abbrev=12"),
    }


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()[0]


def ensure_checkpoint(directory: Path, name: str, num_layers: int | None = None) -> Path:
    """Return a bfloat16 checkpoint of a shape, with another number of layers if wanted, made on first use."""
    shape = replace(SHAPES[name], num_layers=num_layers or SHAPES[name].num_layers)
    path = directory / f"rwkv7-{name}-shaped-{shape.num_layers}-layers.safetensors"
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        partial = path.with_name("partial-" + path.name)
        save_synthetic(partial, shape, seed=0, dtype=torch.bfloat16, device="cuda")
        partial.rename(path)
    return path


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Return the seconds one of `repeats` calls takes on the device, after two that are not counted."""
    for _ in range(2):
        run()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats


def ceilings(device: torch.device) -> dict[str, float]:
    """Memory read and copied, a large product, small products, copies to and from the host."""
    read, copied = _memory_rates(
        torch.randn(1 << 30, device=device)
    )  # 4 GiB; sums of integers are no measure of memory
    square = torch.randn(8192, 8192, dtype=torch.bfloat16, device=device)
    weight = torch.randn(8, 4096, 4096, dtype=torch.bfloat16, device=device)  # more than the cache holds
    figures = {
        "read_gb_per_second": read / 1e9,
        "copy_gb_per_second": copied / 1e9,
        "bf16_tflops": 2 * 8192**3 / seconds(lambda: square @ square, 5) / 1e12,
    }
    for rows in (1, 16, 64, 256):
        x = torch.randn(rows, 4096, dtype=torch.bfloat16, device=device)
        out = x.new_empty(len(weight), rows, 4096)
        replay = CudaGraphs().record(lambda x=x, out=out: _multiply(x, weight, out))  # type: ignore[misc]
        taken = seconds(replay, 5)
        figures[f"product_of_{rows}_rows_gb_per_second"] = weight.nbytes / taken / 1e9
    host = torch.empty(256 << 20, dtype=torch.uint8).pin_memory()
    there = torch.empty_like(host, device=device)
    figures["to_device_gb_per_second"] = host.nbytes / 1e9 / seconds(lambda: there.copy_(host, non_blocking=True), 5)
    figures["to_host_gb_per_second"] = host.nbytes / 1e9 / seconds(lambda: host.copy_(there, non_blocking=True), 5)
    return {name: round(value, 1) for name, value in figures.items()}


def _multiply(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    for matrix, place in zip(weight, out, strict=True):
        torch.matmul(x, matrix.T, out=place)


def _memory_rates(data: torch.Tensor) -> tuple[float, float]:
    """Bytes a second when `data` is read, and when half of it is copied to the other."""
    half = len(data) // 2
    read = data.nbytes / seconds(lambda: data.sum(), 5)
    return read, data.nbytes / seconds(lambda: data[:half].copy_(data[half:]), 5)


def plain_step(model: RWKV7, pool: StatePool, forbidden_ids: torch.Tensor) -> DecodeStep:
    """As `triton_step`, on PyTorch's operators and greedy: its sampling reads the device."""

    def step(fields: dict[str, torch.Tensor], sampled: torch.Tensor) -> None:
        slots = torch.where(fields["slots"] < 0, pool.scratch_slot, fields["slots"])
        batch = InputBatch(fields["token_ids"], slots, fields["starts"], fields["starts"][1:] - 1)
        sampled[: len(slots)] = model.logits(model.forward(batch, pool)).argmax(dim=-1)

    return step


def new_table(num_rows: int, first_slot: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Return what a step of `num_rows` rows reads, in consecutive slots, each with tokens of its own."""
    sampling = [SamplingParams(seed=i, temperature=1.0, top_p=0.9) for i in range(num_rows)]
    rows = [DecodeRow(first_slot + i, sampling[i], 9, token_id=first_slot + i + 1) for i in range(num_rows)]
    size = Size(num_rows, num_rows)
    host, there = HostTable(size, is_pinned=False), RowTable(size, device)
    host.fill(rows_of(rows), (), size)
    there.data.copy_(host.data)
    return there.first(size)


def _no_ids(device: torch.device) -> torch.Tensor:
    return torch.zeros(0, dtype=torch.int64, device=device)


def _no_samples(device: torch.device) -> torch.Tensor:
    return torch.zeros(1024, dtype=torch.int64, device=device)


def new_pool(model: RWKV7, num_slots: int, state_dtype: torch.dtype = torch.float32) -> StatePool:
    """Return a pool with states as after a few tokens: zeros as data run faster."""
    pool = StatePool(model.config.state_spec_in(state_dtype), num_slots, model.device)
    pool.wkv.normal_(std=0.1)
    pool.shift.normal_()
    return pool


def decode(path: Path, device: torch.device, make_step: Callable[..., DecodeStep]) -> dict[str, object]:
    """Milliseconds and tokens a second by batch size, sampling included: one graph a step."""
    model = load_model(path, device, "bfloat16")
    figures: dict[str, object] = {}
    for batch in BATCH_SIZES:
        if not _states_fit(model, batch):
            figures[str(batch)] = "states do not fit"
            continue
        figures[str(batch)] = decode_rate(model, batch, make_step)
        print(f"decode {path.stem} {batch}: {figures[str(batch)]}", flush=True)
        torch.cuda.empty_cache()
    return figures


def _states_fit(model: RWKV7, batch: int) -> bool:
    free, _ = torch.cuda.mem_get_info(model.device)
    return free >= 1.3 * SLOT_SETS * batch * model.config.state_spec.num_bytes


def int8_beside_bfloat16(path: Path, device: torch.device) -> dict[str, object]:
    """Bytes, steps and prompts with weights of either kind, in turn, as ratios; what must hold of int8 bit for bit."""
    models: dict[str, RWKV7] = {}
    figures: dict[str, object] = {}
    for dtype in ("bfloat16", "int8"):
        before = torch.cuda.memory_allocated(device)
        models[dtype] = load_model(path, device, dtype)
        figures[f"weights_gb_{dtype}"] = round((torch.cuda.memory_allocated(device) - before) / 1e9, 3)
    if not models["int8"].is_int8:
        raise RuntimeError("the int8 model has no int8 weights: there is nothing to compare")
    figures["correctness"] = correctness(models["int8"])
    figures["logits_correlation"] = _correlation(*((model, torch.float32) for model in models.values()))
    for batch in BATCH_SIZES:
        fits = _states_fit(models["int8"], batch)
        ways = {name: partial(_step_ms, model, batch) for name, model in models.items()}
        figures[f"decode_{batch}"] = _in_turn(ways) if fits else "states do not fit"
    for rows, length in PROMPTS:
        ways = {name: partial(prompt_ms, model, rows, length) for name, model in models.items()}
        figures[f"prompt_{rows}x{length}"] = _in_turn(ways)
    return figures


def float16_states_beside_float32(model: RWKV7) -> dict[str, object]:
    """Steps and prompts with states of either kind, in turn, as ratios; what must hold of float16 bit for bit."""
    dtypes = {"float32": torch.float32, "float16": torch.float16}
    figures: dict[str, object] = {
        "correctness": correctness(model, torch.float16),
        "logits_correlation": _correlation(*((model, dtype) for dtype in dtypes.values())),
    }
    for batch in BATCH_SIZES:
        ways = {name: partial(_step_ms, model, batch, dtype) for name, dtype in dtypes.items()}
        figures[f"decode_{batch}"] = _in_turn(ways) if _states_fit(model, batch) else "states do not fit"
    for rows, length in PROMPTS:
        ways = {name: partial(prompt_ms, model, rows, length, dtype) for name, dtype in dtypes.items()}
        figures[f"prompt_{rows}x{length}"] = _in_turn(ways)
    return figures


def _step_ms(model: RWKV7, batch: int, state_dtype: torch.dtype = torch.float32) -> float:
    return decode_rate(model, batch, triton_step, num_pieces=3, state_dtype=state_dtype)["median_ms"]


def _in_turn(ways: Mapping[str, Callable[[], float]]) -> dict[str, float]:
    """Return the milliseconds of two ways, the better of two turns, and how many times faster the second is."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(2):
        for name, measure in ways.items():
            taken[name].append(measure())
            torch.cuda.empty_cache()
    best = {f"{name}_ms": round(min(of_turns), 4) for name, of_turns in taken.items()}
    first, second = ways
    best[f"{second}_over_{first}"] = round(best[f"{first}_ms"] / best[f"{second}_ms"], 3)
    print(best, flush=True)
    return best


def _correlation(*subjects: tuple[RWKV7, torch.dtype]) -> float:
    """Return the correlation of the logits after a prompt, of two models and dtypes of their states."""
    logits = []
    for model, state_dtype in subjects:
        torch.manual_seed(0)  # the same prompt
        logits.append(consume(model, new_pool(model, 2, state_dtype), [0], 64).flatten())
    return round(float(torch.corrcoef(torch.stack(logits).double())[0, 1]), 6)


def decode_rate(
    model: RWKV7,
    batch: int,
    make_step: Callable[..., DecodeStep],
    num_pieces: int = 6,
    state_dtype: torch.dtype = torch.float32,
) -> dict[str, float]:
    """Median, best and worst of the steps, in pieces of ten; disjoint sets of states in turn."""
    device = model.device
    pool = new_pool(model, SLOT_SETS * batch + 1, state_dtype)
    step, graphs, sampled = make_step(model, pool, _no_ids(device)), CudaGraphs(), _no_samples(device)
    tables = [new_table(batch, turn * batch, device) for turn in range(SLOT_SETS)]
    replays = [graphs.record(lambda table=table: step(table, sampled)) for table in tables]  # type: ignore[misc]
    num_launched = 0

    def launch() -> None:
        nonlocal num_launched
        replays[num_launched % SLOT_SETS]()
        num_launched += 1

    taken = sorted(seconds(launch, 10) for _ in range(num_pieces))
    return {
        "tokens_per_second": round(batch / statistics.median(taken), 1),
        "best_ms": round(taken[0] * 1e3, 4),
        "median_ms": round(statistics.median(taken) * 1e3, 4),
        "worst_ms": round(taken[-1] * 1e3, 4),
    }


def correctness(model: RWKV7, state_dtype: torch.dtype = torch.float32) -> dict[str, bool]:
    """What must hold bit for bit on a card: graphs, batch sizes, places, padding, repetition, saved states."""
    device = model.device
    pool = new_pool(model, 66, state_dtype)
    before = pool.wkv.clone(), pool.shift.clone()
    graphs = DecodeGraphs(
        triton_step(model, pool, torch.zeros(0, dtype=torch.int64, device=device)), 64, device, CudaGraphs()
    )
    untouched = torch.equal(pool.wkv, before[0]) and torch.equal(pool.shift, before[1])

    def restore() -> None:
        pool.wkv.copy_(before[0])
        pool.shift.copy_(before[1])

    def rows(slots: list[int]) -> list[DecodeRow]:
        return [DecodeRow(slot, SamplingParams(seed=slot), 9, token_id=slot + 1) for slot in slots]

    def run(slots: list[int]) -> dict[int, tuple[int, torch.Tensor, torch.Tensor]]:
        restore()
        ids = graphs.launch(rows(slots)).token_ids()
        return {s: (ids[i], pool.wkv[s].clone(), pool.shift[s].clone()) for i, s in enumerate(slots)}

    def same(left: dict[int, tuple[int, torch.Tensor, torch.Tensor]], slots: list[int]) -> bool:
        right = run(slots)
        return all(
            left[s][0] == right[s][0] and all(torch.equal(left[s][n], right[s][n]) for n in (1, 2)) for s in slots
        )

    most = run(list(range(64)))
    figures = {
        "recording_touches_no_state": untouched,
        "repeated_20_times": all(same(most, list(range(64))) for _ in range(20)),
        "alone_as_among_256": _alone_as_among(model, state_dtype),
        "places_exchanged": same(most, list(range(63, -1, -1))),
        "every_bucket": all(same(most, list(range(bucket))) for bucket in graphs.buckets),
        "padding": same(most, [5, 1, 40]),
    }
    run([5, 1, 40])
    others = [slot for slot in range(65) if slot not in (5, 1, 40)]
    figures["others_untouched"] = torch.equal(pool.wkv[others], before[0][others])
    figures["graph_equals_eager"] = _eager_equals(model, pool, restore, most)
    restore()
    state = pool.save(7, 0, b"")
    pool.load(9, state)
    figures["saved_and_loaded"] = torch.equal(pool.wkv[7], pool.wkv[9]) and torch.equal(pool.shift[7], pool.shift[9])
    return figures


def _alone_as_among(model: RWKV7, state_dtype: torch.dtype, most: int = 256) -> bool:
    """Say whether rows have the same bits in batches of other tiles, states and tokens."""
    device, pool = model.device, new_pool(model, most + 1, state_dtype)
    before = pool.wkv.clone(), pool.shift.clone()
    step, expected = triton_step(model, pool, _no_ids(device)), None
    for num_rows in (most, 128, 64, 32, 16, 1):
        pool.wkv.copy_(before[0])
        pool.shift.copy_(before[1])
        table = {name: field[:num_rows] for name, field in new_table(most, 0, device).items()}
        table["starts"] = torch.arange(num_rows + 1, device=device)
        sampled = _no_samples(device)
        step(table, sampled)
        found = sampled[:num_rows], pool.wkv[:num_rows].clone(), pool.shift[:num_rows].clone()
        expected = expected or found
        if not all(torch.equal(left, right[:num_rows]) for left, right in zip(found, expected, strict=True)):
            print(f"a row among {num_rows} has other bits than among {most}", flush=True)
            return False
    return True


def _eager_equals(
    model: RWKV7,
    pool: StatePool,
    restore: Callable[[], None],
    expected: dict[int, tuple[int, torch.Tensor, torch.Tensor]],
) -> bool:
    restore()
    indices = torch.arange(65, device=model.device)
    model.forward(InputBatch(indices[:64] + 1, indices[:64], indices, indices[:64]), pool)
    return all(torch.equal(pool.wkv[slot], wkv) for slot, (_, wkv, _) in expected.items())


def consume(model: RWKV7, pool: StatePool, slots: list[int], num_tokens: int) -> torch.Tensor:
    """Let each slot consume `num_tokens` random tokens, and return the last logits."""
    device, logits = model.device, torch.empty(0)
    for begin in range(0, num_tokens, max(1, PIECE)):
        length = min(PIECE, num_tokens - begin)
        starts = torch.arange(len(slots) + 1, device=device) * length
        ids = torch.randint(model.config.vocab_size, (length * len(slots),), device=device)
        batch = InputBatch(ids, torch.tensor(slots, device=device), starts, starts[1:] - 1)
        logits = model.logits(model.forward(batch, pool))
    return logits


def by_context(path: Path, device: torch.device) -> dict[str, dict[str, float]]:
    """Milliseconds of a step and memory, after so many tokens."""
    model = load_model(path, device, "bfloat16")
    pool = new_pool(model, 2)
    graphs = DecodeGraphs(
        triton_step(model, pool, torch.zeros(0, dtype=torch.int64, device=device)), 1, device, CudaGraphs()
    )
    figures, consumed = {}, 0
    for context in CONTEXTS:
        consume(model, pool, [0], context - consumed)
        consumed = context
        row = [DecodeRow(0, SamplingParams(seed=1), context, token_id=1)]
        torch.cuda.reset_peak_memory_stats(device)
        figures[str(context)] = {
            "step_ms": round(seconds(lambda row=row: graphs.launch(row), 50) * 1e3, 4),  # type: ignore[misc]
            "memory_gb": round(torch.cuda.max_memory_allocated(device) / 1e9, 3),
        }
    return figures


def transformer_by_context(device: torch.device) -> dict[str, dict[str, float]]:
    """The same of a transformer with a static cache, captured as ours is."""
    figures = {}
    for context in CONTEXTS:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        model, ids = StaticCacheTransformer(1, context, device), torch.zeros(1, dtype=torch.int64, device=device)
        replay = CudaGraphs().record(lambda model=model, ids=ids: ids.copy_(model.step(ids)))  # type: ignore[misc]
        figures[str(context)] = {
            "step_ms": round(seconds(replay, 50) * 1e3, 4),
            "memory_gb": round(torch.cuda.max_memory_allocated(device) / 1e9, 3),
            "parameters": float(model.num_parameters),
        }
        del model, replay
    return figures


def prefill(path: Path, device: torch.device) -> Mapping[str, float]:
    """Tokens a second of prompts, logits of the last token only; replayed, because the host's launches take longer."""
    model = load_model(path, device, "bfloat16")
    figures = {}
    for rows, length in PROMPTS:
        figures[f"{rows} x {length}"] = round(rows * length / prompt_ms(model, rows, length) * 1e3, 1)
        print(f"prefill {rows} x {length}: {figures[f'{rows} x {length}']} tokens a second", flush=True)
    return figures


def prompt_ms(model: RWKV7, num_rows: int, length: int, state_dtype: torch.dtype = torch.float32) -> float:
    """Return the milliseconds of so many prompts, replayed."""
    pool = new_pool(model, num_rows + 1, state_dtype)
    return 1e3 * seconds(CudaGraphs().record(lambda: _prompts(model, pool, num_rows, length)), 5)


def _prompts(model: RWKV7, pool: StatePool, num_rows: int, length: int) -> None:
    starts = torch.arange(num_rows + 1, device=model.device) * length
    ids = torch.arange(num_rows * length, device=model.device) * 7919 % model.config.vocab_size
    batch = InputBatch(ids, torch.arange(num_rows, device=model.device), starts, starts[1:] - 1)
    model.logits(model.forward(batch, pool))


if __name__ == "__main__":
    sys.exit(main())
