from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from engine.tokenizer.loading import load as load_tokenizer
from engine.tokenizer.tokenizer import Tokenizer
from training.benchmarks import lambada, multiple_choice, read_questions, score_text
from training.evaluate import recall, score_rows
from training.generate import generate_greedy
from training.model import ModelShape, Rwkv7
from training.scoring import Example, Likelihood, LocalScorer
from training.train import prepare_data

from .conftest import TINY

PASSAGES = ["I have a dog named Rex", "my favorite color is blue", "what is my name, friend"]


@pytest.fixture
def tokenizer(prepared: Path) -> Tokenizer:
    """The tiny run's tokenizer."""
    return load_tokenizer("auto", prepared, 300)


@pytest.fixture
def model() -> Rwkv7:
    """A model whose answers depend on everything it has read."""
    torch.manual_seed(1)
    model = Rwkv7(ModelShape(vocab_size=300, width=32, num_layers=2, head_size=16))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize("prefixed", [False, True])
def test_lambada_is_the_likelihood_of_last_words(model: Rwkv7, tokenizer: Tokenizer, prefixed: bool) -> None:
    """Passages scored together, filled up to one length, give what each gives token by token."""
    score = lambada(LocalScorer(model), tokenizer, PASSAGES, prefix_end_of_text=prefixed)
    total, correct = 0.0, 0
    for passage in PASSAGES:
        context, word = passage.rsplit(" ", 1)
        ids, target = [0] * prefixed + tokenizer.encode(context), tokenizer.encode(" " + word)
        greedy = True
        for token in target:
            x, _ = model(torch.tensor([ids]))
            log_probabilities = model.logits(x[0, -1]).log_softmax(0)
            total += float(log_probabilities[token].detach())
            greedy &= int(log_probabilities.argmax()) == token
            ids = [*ids, token]
        correct += greedy
    assert score.perplexity == pytest.approx(math.exp(-total / 3), rel=1e-4)
    assert score.accuracy == correct / 3


def test_choices_are_compared_by_likelihood_and_by_that_of_a_byte(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The likeliest choice is the answer; one that is likelier byte by byte is the answer of the other measure."""

    class Table:
        def score(self, examples: Sequence[Example]) -> list[Likelihood]:
            scores = {" no": -3.0, " yes, of course": -6.0}
            return [Likelihood(scores[tokenizer.decode(example.continuation)], False) for example in examples]

        def log_probability(self, ids: Sequence[int]) -> float:
            raise AssertionError("no text is asked about")

    path = tmp_path / "q.jsonl"
    path.write_text('{"notice": "n"}\n{"context": "Is it?", "choices": [" no", " yes, of course"], "answer": 1}\n')
    score = multiple_choice(Table(), tokenizer, read_questions(path))
    assert (score.num_questions, score.accuracy, score.accuracy_per_byte) == (1, 0.0, 1.0)


def test_text_is_scored_with_the_state_carried(
    model: Rwkv7, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows give what one window gives, and bits per byte count bytes of the text."""
    text = "I have a dog. " * 10 + "é"
    whole = score_text(LocalScorer(model), tokenizer, text)
    monkeypatch.setattr("training.scoring._WINDOW_TOKENS", 7)
    assert score_text(LocalScorer(model), tokenizer, text).nats == pytest.approx(whole.nats, rel=1e-5)
    assert whole.bits_per_byte == pytest.approx(whole.nats / math.log(2) / (14 * 10 + 2))
    assert whole.perplexity == pytest.approx(math.exp(whole.nats / whole.weight))


def test_greedy_answers_do_not_depend_on_the_batch(model: Rwkv7, tokenizer: Tokenizer) -> None:
    """A prompt has the same answer alone and among longer ones, and it is the arg-max of each step."""
    prompts = [tokenizer.encode(text) for text in PASSAGES]
    together = generate_greedy(model, prompts, 6, [])
    assert together == [generate_greedy(model, [prompt], 6, [])[0] for prompt in prompts]
    ids = list(prompts[0])
    for token in together[0]:
        x, _ = model(torch.tensor([ids]))
        assert int(model.logits(x[0, -1]).argmax()) == token
        ids.append(token)


def test_greedy_answers_end_before_a_stop(model: Rwkv7, tokenizer: Tokenizer) -> None:
    """What comes before the first stop id is the answer."""
    prompt = tokenizer.encode(PASSAGES[0])
    [free] = generate_greedy(model, [prompt], 8, [])
    stop = free[3]
    assert generate_greedy(model, [prompt], 8, [stop]) == [free[: free.index(stop)]]


def test_held_out_loss_is_weighted_by_tokens(model: Rwkv7, prepared: Path, tokenizer: Tokenizer) -> None:
    """The loss of all rows is the mean over their learnt tokens, and the model is left in the mode it was in."""
    rows = prepare_data(TINY, prepared, Path()).held_out["short"]
    token_bytes = torch.tensor([len(tokenizer.token_bytes(token)) for token in range(300)])
    model.train()
    score = score_rows(model, rows, 100, token_bytes)
    assert model.training
    batch = rows.batch(range(len(rows)))
    x, _ = model.eval()(batch.inputs, None, batch.resets)
    losses = torch.nn.functional.cross_entropy(model.logits(x).flatten(0, 1), batch.targets.flatten(), reduction="none")
    expected = (losses * batch.weights.flatten()).sum() / batch.weights.sum()
    assert score.loss == pytest.approx(float(expected.detach()), rel=1e-5)
    learnt = batch.targets[batch.weights > 0].tolist()
    text = tokenizer.decode([token for token in learnt if token])
    assert score.num_bytes == pytest.approx(len(text.encode()))


def test_nothing_to_score_is_not_a_number(model: Rwkv7, prepared: Path) -> None:
    """No rows give NaN, not a division by zero."""
    rows = prepare_data(TINY, prepared, Path()).held_out["short"]
    assert math.isnan(score_rows(model, rows, 0, torch.ones(300)).loss)


def test_recall_of_a_model_that_knows_nothing(model: Rwkv7, tokenizer: Tokenizer) -> None:
    """Random weights name no held-out value."""
    share, pairs = recall(model, tokenizer, 1, 4)
    assert share == 0
    assert len(pairs) == 4
