"""Rows whose grammar or minimum length limits what may be sampled, among rows that are free."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import tokenizer as tokenizers
from engine.config import EngineConfig
from engine.messages import Grammar, SamplingParams
from engine.runner.grammars import GrammarMatcher, Grammars
from engine.runner.model_runner import TorchModelRunner, load_runner
from engine.runner.plan import Chunk, StepPlan
from engine.tokenizer import Tokenizer
from tests.conftest import ROOT
from tests.engine.runner.test_grammars import GROWING

MAX_TOKENS = 400


class Bench:
    """A runner, its vocabulary and its grammars."""

    def __init__(self, path: Path) -> None:
        def load_tokenizer(vocab_size: int) -> Tokenizer:
            return tokenizers.load("auto", path, vocab_size)

        config = EngineConfig(model_path=str(path), num_threads=1, max_num_seqs=8)
        self.runner = load_runner(config, lambda model: load_tokenizer(model.config.vocab_size).forbidden_ids)
        self.tokenizer = load_tokenizer(self.runner.vocab_size)
        self.grammars = Grammars(self.tokenizer, self.runner.vocab_size)

    def sequence(self, slot: int, prompt: str, sampling: SamplingParams) -> Sequence:
        """Return a sequence that is about to consume its prompt."""
        self.runner.start(slot)
        matcher = None if sampling.grammar is None else self.grammars.compile(sampling.grammar).result()
        return Sequence(self, slot, self.tokenizer.encode(prompt), sampling, matcher)


class Sequence:
    """What the scheduler does for one sequence, without stopping rules."""

    def __init__(
        self, bench: Bench, slot: int, prompt_ids: list[int], sampling: SamplingParams, matcher: GrammarMatcher | None
    ) -> None:
        self.output_ids: list[int] = []
        self.ended = False
        self.failed: str | None = None
        self._bench = bench
        self._chunk = functools.partial(Chunk, slot, sampling=sampling, matcher=matcher)
        self._prompt_ids = prompt_ids

    def chunk(self) -> Chunk:
        """Return the next chunk."""
        ends = self._bench.tokenizer.eos_token_ids
        position = len(self._prompt_ids) + len(self.output_ids)
        token_ids = self.output_ids[-1:] or self._prompt_ids
        return self._chunk(token_ids=token_ids, position=position, stop_token_ids=ends)

    def take(self, output: Any) -> None:
        """Take what came of it."""
        self.failed = output.failed or output.grammar_error
        is_end = output.token_id is None or output.token_id in self._bench.tokenizer.eos_token_ids
        self.output_ids += [] if is_end else [output.token_id]
        self.ended = is_end or output.is_complete or len(self.output_ids) == MAX_TOKENS

    @property
    def text(self) -> str:
        """What was said."""
        return self._bench.tokenizer.decode(self.output_ids)


def run(bench: Bench, *sequences: Sequence) -> None:
    """Run sequences together until each has ended."""
    while running := [sequence for sequence in sequences if not sequence.ended]:
        outputs = bench.runner.step(StepPlan([sequence.chunk() for sequence in running])).chunks
        for sequence, output in zip(running, outputs, strict=True):
            sequence.take(output)


@pytest.fixture(scope="module", params=["bytes", "bundled"])
def bench(request: pytest.FixtureRequest, tiny_model: Path) -> Iterator[Bench]:
    """A random model over bytes, and the bundled one with its own vocabulary."""
    path = tiny_model if request.param == "bytes" else ROOT / "models" / "default"
    if not any(path.glob("*.safetensors")) and not path.is_file():
        pytest.skip("the bundled model is not in this checkout")
    bench = Bench(path)
    yield bench
    bench.grammars.close()


def schemas() -> st.SearchStrategy[dict[str, Any]]:
    """Small schemas in which every text is short enough for a model that knows nothing of them."""
    leaves = st.one_of(
        st.just({"type": "boolean"}),
        st.just({"type": "null"}),
        st.builds(
            lambda low, size: {"type": "integer", "minimum": low, "maximum": low + size},
            st.integers(-50, 50),
            st.integers(0, 200),
        ),
        st.builds(lambda size: {"type": "string", "maxLength": size}, st.integers(0, 5)),
        st.builds(lambda size: {"type": "string", "pattern": f"^[a-c]{{1,{size}}}$"}, st.integers(1, 5)),
        st.builds(lambda values: {"enum": values}, st.lists(st.text(max_size=4), min_size=1, max_size=3, unique=True)),
        st.sampled_from([{"const": "é☃"}, {"const": 1.5}, {"type": ["null", "boolean"]}]),
    )
    return st.recursive(leaves, _nested, max_leaves=4)


def _nested(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    names = st.sampled_from(["a", "b", "long name", "é"])
    return st.one_of(
        st.builds(
            lambda properties, optional: {
                "type": "object",
                "properties": properties,
                "required": [name for name in properties if name != optional],
                "additionalProperties": False,
            },
            st.dictionaries(names, inner, max_size=3),
            names,
        ),
        st.builds(
            lambda items, low, more: {"type": "array", "items": items, "minItems": low, "maxItems": low + more},
            inner,
            st.integers(0, 1),
            st.integers(0, 2),
        ),
        st.builds(lambda one, other: {"anyOf": [one, other]}, inner, inner),
    )


@settings(max_examples=40)
@given(schema=schemas(), seed=st.integers(0, 1000), temperature=st.sampled_from([0.0, 1.0]))
def test_outputs_validate_against_any_schema(
    bench: Bench, schema: dict[str, Any], seed: int, temperature: float
) -> None:
    """Whatever the model would rather say, what it says is JSON and what the schema asks for."""
    grammar = Grammar(kind="json_schema", text=json.dumps(schema), lead=" ?")
    sequence = bench.sequence(0, "Assistant:", SamplingParams(seed=seed, temperature=temperature, grammar=grammar))
    run(bench, sequence)
    assert sequence.failed is None
    jsonschema.validate(json.loads(sequence.text), schema)


def test_a_batch_equals_single_runs(bench: Bench) -> None:
    """Constrained rows and free ones say together what each says alone, tokens and log-probabilities."""
    grammars = [
        None,
        Grammar(kind="regex", text="[a-d]{1,30}x"),
        Grammar(kind="json_schema", text='{"type": "array", "items": {"type": "boolean"}, "maxItems": 6}'),
        None,
        Grammar(kind="regex", text="[a-d]{1,30}x"),
    ]
    params = [
        SamplingParams(seed=n, grammar=grammar, num_logprobs=2, frequency_penalty=0.5, top_p=0.9)
        for n, grammar in enumerate(grammars)
    ]
    together = [bench.sequence(n, f"Line {n}", p) for n, p in enumerate(params)]
    run(bench, *together)
    for n, p in enumerate(params):
        alone = bench.sequence(7, f"Line {n}", p)
        run(bench, alone)
        assert alone.output_ids == together[n].output_ids


def test_log_probabilities_are_the_models_own(bench: Bench) -> None:
    """What a grammar forbids may still be the most likely token, and is reported as such."""
    grammar = Grammar(kind="regex", text="☃")
    free, bound = (
        bench.sequence(n, "Hello", SamplingParams(seed=1, temperature=0, grammar=g, num_logprobs=1))
        for n, g in enumerate((None, grammar))
    )
    outputs = bench.runner.step(StepPlan([free.chunk(), bound.chunk()])).chunks
    assert outputs[0].logprobs is not None
    assert outputs[1].logprobs is not None
    assert outputs[1].token_id != outputs[0].token_id
    assert outputs[1].logprobs.top_ids == outputs[0].logprobs.top_ids == [outputs[0].token_id]


def test_a_row_that_becomes_nan_fails_alone(bench: Bench) -> None:
    """A mask does not hide it: the row's neighbour goes on, and its own matcher was told nothing."""
    sampling = SamplingParams(seed=3, grammar=Grammar(kind="regex", text="[a-z]{1,9}"))
    broken, sound, alone = (bench.sequence(slot, "x", sampling) for slot in (0, 1, 2))
    state = bench.runner.save(0, 0, b"")
    for tensor in state.tensors.values():
        tensor.fill_(torch.nan)
    bench.runner.load(0, state)
    run(bench, broken, sound)
    run(bench, alone)
    assert broken.failed == "the row became NaN or infinite"
    assert sound.failed is None
    assert sound.output_ids == alone.output_ids
    matcher = broken.chunk().matcher
    assert matcher is not None
    assert not matcher.is_complete
    assert matcher.allowed((), may_stop=True) is not None


def test_a_grammar_that_cannot_be_followed_fails_its_row_alone(bench: Bench) -> None:
    """What was sampled before is lost with it; its neighbour goes on."""
    broken = bench.sequence(0, "x", SamplingParams(seed=1, grammar=GROWING))
    sound = bench.sequence(1, "x", SamplingParams(seed=1, grammar=Grammar(kind="regex", text="ab")))
    run(bench, broken, sound)
    assert broken.failed is not None
    assert broken.failed.startswith("grammar ")
    assert sound.text == "ab"


def test_where_only_the_end_is_possible_nothing_is_sampled(bench: Bench) -> None:
    """The prompt is consumed, the output is empty."""
    sequence = bench.sequence(0, "x", SamplingParams(seed=1, grammar=Grammar(kind="lark", text='start: ""')))
    (output,) = bench.runner.step(StepPlan([sequence.chunk()])).chunks
    assert (output.token_id, output.is_complete, output.failed) == (None, True, None)
    free = bench.sequence(1, "x", SamplingParams(seed=1))
    bench.runner.step(StepPlan([free.chunk()]))
    for name, tensor in bench.runner.save(0, 1, b"").tensors.items():
        assert torch.equal(tensor, bench.runner.save(1, 1, b"").tensors[name])


def test_what_would_end_a_sequence_too_early_is_not_sampled(bench: Bench) -> None:
    """The most likely token ends the sequence: it comes only when it may."""
    runner: TorchModelRunner = bench.runner
    greedy = SamplingParams(seed=0, temperature=0)

    def most_likely(**rules: Any) -> int:
        runner.start(0)
        token_id = runner.step(StepPlan([Chunk(0, [65], sampling=greedy, **rules)])).chunks[0].token_id
        assert token_id is not None
        return token_id

    first = most_likely()
    assert most_likely(stop_token_ids=[first]) == first
    assert most_likely(stop_token_ids=[first], may_stop=False) != first
