"""The model runner on PyTorch: slots that hold states, and steps that advance them.

Knows a model, a pool and a sampler; not why a chunk is asked for. Everything here runs on the engine's one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import msgspec
import torch
from msgspec.structs import replace

import kernels
from engine.config import EngineConfig
from engine.errors import InvalidRequest
from engine.messages import SamplingParams, TokenLogprobs
from engine.models.load import load_model
from engine.models.rwkv7 import RWKV7
from engine.runner.grammars import Allowed
from engine.runner.input_batch import InputBatch, targets_of
from engine.runner.logprobs import report_logprobs
from engine.runner.penalties import PenaltyCounters
from engine.runner.plan import Chunk, ChunkOutput, Launch, StepOutput, StepPlan
from engine.runner.sampler import restrict, rules_of, sample, truncate
from engine.state.pool import StatePool
from engine.state.spec import RecurrentState, StateSpec
from engine.weights.open import find_weights_file

# Prompt log-probabilities are reduced in tiles of rows whose logits take about so much: never T x V.
LOGITS_TILE_BYTES = 16 << 20

# A step of a smaller model takes less than two milliseconds: threads would meet more often than they work, and on a
# machine whose other cores serve the API, wait for each other (measured: twice the step time for 7 M parameters).
SMALL_FILE_BYTES = 32 << 20

STATE_DTYPES = {"float32": torch.float32, "float16": torch.float16}

BROKEN = "the row became NaN or infinite"


class Row(msgspec.Struct, frozen=True):
    """A chunk and what was found out about it before the model runs."""

    chunk: Chunk  # what is run of it; it samples only what may be sampled
    answer: ChunkOutput | None = None  # why it is not run
    allowed: Allowed | None = None  # by its grammar
    is_complete: bool = False  # its grammar allows nothing but the end


def choose_device(name: str) -> torch.device:
    """Return the device that `name` means; `auto` is CUDA where there is a card."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def choose_state_dtype(name: str) -> torch.dtype:
    """Return the dtype of the states' matrices that `name` means; raises `ValueError` if no operator keeps it."""
    if name not in STATE_DTYPES:
        raise ValueError(f"state_dtype is {name!r}, not one of {', '.join(STATE_DTYPES)}")
    return STATE_DTYPES[name]


def choose_num_threads(config: EngineConfig) -> int | None:
    """Return how many threads the operators get; None is one a core."""
    if config.num_threads:
        return config.num_threads
    return 1 if find_weights_file(config.model_path).stat().st_size < SMALL_FILE_BYTES else None


def load_runner(config: EngineConfig, forbidden_ids: Callable[[RWKV7], Sequence[int]]) -> TorchModelRunner:
    """Return a runner for the model of `config`: two slots for each sequence, one being for snapshots, and one more.

    `forbidden_ids` is asked for the ids without bytes once the model, and with it the vocabulary's size, is known.
    Raises `ModelFileError`, and `ValueError` for a `state_dtype` that there is not.
    """
    state_dtype = choose_state_dtype(config.state_dtype)
    device = choose_device(config.device)
    backend = kernels.select_backend(device, choose_num_threads(config))
    if device.type == "cpu" and backend != kernels.PYTORCH:
        torch.set_num_threads(1)  # the operators bring their own threads, and what is left to PyTorch is small
    elif config.num_threads:
        torch.set_num_threads(config.num_threads)
    model = load_model(config.model_path, device, config.dtype, config.head_norm_eps)
    state_spec = model.config.state_spec_in(state_dtype)
    num_slots = 2 * config.max_num_seqs + 1
    if device.type == "cuda" and backend != kernels.PYTORCH:
        from engine.runner.cuda_graphs import can_record
        from engine.runner.graph_runner import GraphModelRunner

        if device.index is not None:
            torch.cuda.set_device(device)  # Triton launches on the thread's current one
        if can_record(model.config):
            return GraphModelRunner(
                model, num_slots, forbidden_ids(model), config.max_num_batched_tokens, state_spec=state_spec
            )
    return TorchModelRunner(model, num_slots, forbidden_ids(model), state_spec)


class TorchModelRunner:
    """Implements `engine.runner.plan.ModelRunner`.

    The last of the `num_slots` is the runner's own, for padding. Rows fail alone: a chunk with an impossible token id
    is not run, a chunk whose row became NaN or infinite is reported, and neither touches its neighbours.
    """

    def __init__(
        self, model: RWKV7, num_slots: int, forbidden_ids: Sequence[int] = (), state_spec: StateSpec | None = None
    ) -> None:
        self.model = model
        self.spec = state_spec or model.config.state_spec
        self.num_slots = num_slots
        self.vocab_size = model.config.vocab_size
        self.pool = StatePool(self.spec, num_slots, model.device)
        self._penalties = PenaltyCounters(num_slots)
        self._forbidden_ids = torch.tensor(sorted(forbidden_ids), dtype=torch.int64, device=model.device)

    @torch.inference_mode()
    def start(self, slot: int) -> None:
        """Give the slot the zero state, and forget the penalty counters of whoever had it before."""
        self.pool.clear(slot)
        self._penalties.reset(slot)

    @torch.inference_mode()
    def load(self, slot: int, state: RecurrentState, consumed_ids: Sequence[int] = ()) -> None:
        """As `start`, from `state`; penalties count `consumed_ids` as if the request had consumed them itself."""
        self.pool.load(slot, state)
        self._penalties.reset(slot)
        self._penalties.consume(slot, consumed_ids)

    def count(self, slot: int, token_ids: Sequence[int], params: SamplingParams) -> None:
        """Let the slot's penalties begin as if `token_ids` had just been generated there."""
        self._penalties.count(slot, token_ids, params)

    def copy(self, source: int, target: int) -> None:
        """Make `target`'s state equal to `source`'s; penalty counters stay with their slots."""
        self.pool.copy(source, target)

    def save(self, slot: int, num_tokens: int, chain: bytes) -> RecurrentState:
        """Return the slot's state, on its way to host memory; the slot may be reused at once."""
        return self.pool.save(slot, num_tokens, chain)

    def launch(self, plan: StepPlan) -> Launch:
        """Return the step, which runs when its output is asked for."""
        return _Deferred(lambda: self._step(plan))

    def can_follow(self, rows: Sequence[int], chunks: Sequence[Chunk]) -> bool:
        """Say no: no step's output can be waited for while another one runs."""
        return False

    def follow(self, rows: Sequence[int], chunks: Sequence[Chunk] = ()) -> Launch:
        """Refuse."""
        raise ValueError("this runner's steps are read one by one")

    def step(self, plan: StepPlan) -> StepOutput:
        """Launch and wait."""
        return self.launch(plan).output()

    @torch.inference_mode()
    def _step(self, plan: StepPlan) -> StepOutput:
        self._check_slots(plan)
        rows = [self._row(chunk) for chunk in plan.chunks]
        sound = [row for row in rows if row.answer is None]
        outputs = iter(self._run(sound) if sound else [])
        return StepOutput([row.answer or next(outputs) for row in rows])

    def _check_slots(self, plan: StepPlan) -> None:
        slots = [chunk.slot for chunk in plan.chunks]
        if len(set(slots)) != len(slots) or not all(0 <= slot < self.pool.scratch_slot for slot in slots):
            raise ValueError(f"a step needs distinct slots in [0, {self.pool.scratch_slot}), not {slots}")
        if not all(chunk.token_ids for chunk in plan.chunks):
            raise ValueError("a chunk without tokens has no last row")

    def _row(self, chunk: Chunk) -> Row:
        """Ask the chunk's grammar what it may sample, and whether it can be run at all."""
        if (problem := self._problem(chunk)) is not None:
            return Row(chunk, ChunkOutput(failed=problem))
        if chunk.matcher is None or chunk.sampling is None:
            return Row(chunk)
        try:
            allowed = chunk.matcher.allowed(chunk.stop_token_ids, may_stop=chunk.may_stop)
        except InvalidRequest as error:
            return Row(chunk, ChunkOutput(grammar_error=str(error)))
        if allowed is None:
            return Row(replace(chunk, sampling=None), is_complete=True)
        return Row(chunk, allowed=allowed)

    def _problem(self, chunk: Chunk) -> str | None:
        """Say why the chunk cannot be run, if it cannot."""
        if self._knows(chunk.token_ids) and self._knows(chunk.stop_token_ids) and not _names_more_ids(chunk):
            return None
        ids = [*chunk.token_ids, *(target for _, target in targets_of(chunk)), *chunk.stop_token_ids]
        ids += chunk.sampling.logit_bias if chunk.sampling else ()
        bad = next((token_id for token_id in ids if not 0 <= token_id < self.vocab_size), None)
        return None if bad is None else f"token id {bad} is not in [0, {self.vocab_size})"

    def _knows(self, ids: Sequence[int]) -> bool:
        """Say whether all `ids` are the vocabulary's."""
        return not ids or (min(ids) >= 0 and max(ids) < self.vocab_size)

    def _run(self, rows: Sequence[Row]) -> list[ChunkOutput]:
        chunks = [row.chunk for row in rows]
        batch = InputBatch.from_chunks(chunks, self.model.device)
        if all([chunk.sampling is not None and chunk.is_plain for chunk in chunks]):
            return self._run_plain(batch, chunks)
        hidden = self.model.forward(batch, self.pool)
        for chunk in chunks:
            self._penalties.consume(chunk.slot, chunk.token_ids[chunk.num_replayed :])
        last, of_targets = hidden[: len(chunks)], hidden[len(chunks) :]
        prompt_logprobs = self._prompt_logprobs(of_targets, chunks)
        sampled = self._sample(last, chunks, [row.allowed for row in rows])
        is_sound = self._is_sound(last, chunks, sampled)
        outputs = []
        for i, row in enumerate(rows):
            token_id, logprobs = sampled.get(i, (None, None))
            output = ChunkOutput(token_id, logprobs, prompt_logprobs[i], is_complete=row.is_complete)
            outputs.append(_followed(row.chunk, output) if is_sound[i] else ChunkOutput(failed=BROKEN))
        return outputs

    def _run_plain(self, batch: InputBatch, chunks: Sequence[Chunk]) -> list[ChunkOutput]:
        """Run chunks that all sample, and none of which will ever be penalised, in one call."""
        rules = rules_of([p for chunk in chunks if (p := chunk.sampling)], [chunk.position for chunk in chunks])
        token_ids = self.model.step(batch, self.pool, self._forbidden_ids, rules).tolist()
        return [ChunkOutput(token_id) if token_id >= 0 else ChunkOutput(failed=BROKEN) for token_id in token_ids]

    def _is_sound(self, last: torch.Tensor, chunks: Sequence[Chunk], sampled: Collection[int]) -> list[bool]:
        """Say for each chunk whether its row is finite.

        A state that is not finite makes its row so, and the row its logits: whatever went wrong in a chunk shows in its
        last row, and where one was to be sampled, no token could be.
        """
        if all(chunk.sampling for chunk in chunks):
            return [i in sampled for i in range(len(chunks))]
        is_finite: list[bool] = torch.isfinite(last).all(dim=-1).tolist()
        return [
            finite and (not c.sampling or i in sampled)
            for i, (c, finite) in enumerate(zip(chunks, is_finite, strict=True))
        ]

    def _sample(
        self, last: torch.Tensor, chunks: Sequence[Chunk], allowed: Sequence[Allowed | None]
    ) -> dict[int, tuple[int, TokenLogprobs | None]]:
        """Return (token id, log-probabilities) of the chunks that asked and whose logits are a distribution."""
        asked = [i for i, chunk in enumerate(chunks) if chunk.sampling]
        if not asked:
            return {}
        logits = self.model.logits(last if len(asked) == len(chunks) else last[asked])
        slots = [chunks[i].slot for i in asked]
        params = [sampling for chunk in chunks if (sampling := chunk.sampling)]
        raw = logits.clone() if any(p.num_logprobs is not None for p in params) else logits
        barred = [() if chunks[i].may_stop else chunks[i].stop_token_ids for i in asked]
        restrict(logits, params, self._forbidden_ids, barred, [allowed[i] for i in asked])
        self._penalties.apply(logits, slots, params)
        truncate(logits, params)
        token_ids = sample(logits, params, [chunks[i].position for i in asked])
        if min(token_ids) < 0:
            drawn = [n for n, token_id in enumerate(token_ids) if token_id >= 0]
            asked, slots, token_ids = ([column[n] for n in drawn] for column in (asked, slots, token_ids))
            params, raw = [params[n] for n in drawn], raw[drawn]
        self._penalties.generate(slots, token_ids, params)
        reported = self._sampled_logprobs(raw, token_ids, params)
        return dict(zip(asked, zip(token_ids, reported, strict=True), strict=True))

    def _sampled_logprobs(
        self, logits: torch.Tensor, token_ids: list[int], params: Sequence[SamplingParams]
    ) -> list[TokenLogprobs | None]:
        reported: list[TokenLogprobs | None] = [None] * len(token_ids)
        asked = [(n, p.num_logprobs) for n, p in enumerate(params) if p.num_logprobs is not None]
        if asked:
            rows, nums_top = [n for n, _ in asked], [num for _, num in asked]
            of_rows = logits if len(rows) == len(logits) else logits[rows]  # a copy costs as much as the report
            found = report_logprobs(of_rows, [token_ids[n] for n in rows], nums_top, self._forbidden_ids)
            for n, logprobs in zip(rows, found, strict=True):
                reported[n] = logprobs
        return reported

    def _prompt_logprobs(
        self, hidden: torch.Tensor, chunks: Sequence[Chunk]
    ) -> list[list[TokenLogprobs | None] | None]:
        """Return what each chunk asked about its targets; `hidden[R, C]` are the rows before them, in order."""
        if all(chunk.num_prompt_logprobs is None for chunk in chunks):
            return [None] * len(chunks)
        asked = [(target, chunk.num_prompt_logprobs or 0) for chunk in chunks for _, target in targets_of(chunk)]
        found = self._target_logprobs(hidden, asked)
        reported: list[list[TokenLogprobs | None] | None] = []
        for chunk in chunks:
            if chunk.num_prompt_logprobs is None or chunk.target_ids is None:
                reported.append(None)
            else:
                reported.append([None if target is None else next(found) for target in chunk.target_ids])
        return reported

    def _target_logprobs(self, hidden: torch.Tensor, asked: list[tuple[int, int]]) -> Iterator[TokenLogprobs]:
        tile = max(1, LOGITS_TILE_BYTES // (4 * self.vocab_size))
        for begin in range(0, len(asked), tile):
            target_ids, nums_top = zip(*asked[begin : begin + tile], strict=True)
            logits = self.model.logits(hidden[begin : begin + tile])
            yield from report_logprobs(logits, target_ids, nums_top, self._forbidden_ids)


@dataclass(frozen=True, slots=True)
class _Deferred:
    """Implements `Launch` where a step occupies the thread that asks for it."""

    output: Callable[[], StepOutput]
    can_be_followed: bool = False


def _names_more_ids(chunk: Chunk) -> bool:
    return chunk.target_ids is not None or (chunk.sampling is not None and bool(chunk.sampling.logit_bias))


def _followed(chunk: Chunk, output: ChunkOutput) -> ChunkOutput:
    """Tell the chunk's grammar what was sampled, unless that ends the text; returns what that makes of the output."""
    token_id = output.token_id
    if chunk.matcher is None or token_id is None or (chunk.may_stop and token_id in chunk.stop_token_ids):
        return output
    try:
        chunk.matcher.advance(token_id)
    except InvalidRequest as error:
        return ChunkOutput(grammar_error=str(error))
    return replace(output, is_complete=chunk.matcher.is_complete)
