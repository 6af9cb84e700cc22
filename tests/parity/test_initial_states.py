"""Conversations from a tuned state say what the trainer's model says from that state, whatever happens between."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.redis_server import RedisServer
from tests.server.replies import error_of
from tests.server_process import ServerProcess, redis_options
from training.adapters import adapt, trained_weights
from training.checkpoint import save_weights
from training.config import TuneSection
from training.export import load_model
from training.model import ModelShape, Rwkv7

PROMPTS = ("What is in a name?", " And in a rose?", " Good night.")
NUM_TOKENS = 12
OPTIONS = ("--dtype", "float32", "--tokenizer", "bytes")


@dataclass(frozen=True)
class Tuned:
    """A model, a directory of initial states for it, and the models that begin from them."""

    model: Path
    states: Path
    models: dict[str | None, Rwkv7]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """A model whose answers depend on everything it has read, and two tuned states, in either format."""
    directory = tmp_path_factory.mktemp("tuned")
    torch.manual_seed(4)
    model = Rwkv7(ModelShape(vocab_size=256, width=32, num_layers=2, head_size=16))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    save_weights(model.state_dict(), directory / "model.safetensors")
    (directory / "states").mkdir()
    models: dict[str | None, Rwkv7] = {None: load_model(directory / "model.safetensors")}
    for name, suffix in (("bard", "safetensors"), ("clerk", "pth")):
        models[name] = load_model(directory / "model.safetensors")
        adapt(models[name], TuneSection(method="state"))
        for parameter in trained_weights(models[name]).values():
            torch.nn.init.normal_(parameter, std=2.0)
        path = directory / "states" / f"{name}.{suffix}"
        state = {key: value.detach() for key, value in trained_weights(models[name]).items()}
        save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    return Tuned(directory / "model.safetensors", directory / "states", models)


@pytest.fixture(scope="module", params=["embedded", "redis"])
def server(
    request: pytest.FixtureRequest, tuned: Tuned, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """A server that has them, on either kind of store."""
    directory = tmp_path_factory.mktemp(f"initial-{request.param}")
    with contextlib.ExitStack() as stack:
        options = [*OPTIONS, "--initial-states", str(tuned.states)]
        if request.param == "redis":
            options += redis_options(stack.enter_context(RedisServer(directory / "redis")).url)
        yield stack.enter_context(ServerProcess(tuned.model, directory / "data", *options))


def complete(server: ServerProcess, prompt: str | list[int], **options: Any) -> dict[str, Any]:
    """Return the reply to a greedy completion."""
    body = {"prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "return_token_ids": True, **options}
    response = server.http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    reply: dict[str, Any] = response.json()
    return reply


def tokens(reply: dict[str, Any]) -> list[int]:
    """Return what was generated."""
    token_ids: list[int] = reply["choices"][0]["token_ids"]
    return token_ids


@torch.no_grad()
def greedy(model: Rwkv7, ids: list[int]) -> list[int]:
    """Return what the trainer's model says after `ids`, each time from its initial state over everything."""
    answer: list[int] = []
    for _ in range(NUM_TOKENS):
        x, _ = model(torch.tensor([ids + answer]))
        answer.append(int(model.logits(x[0, -1]).argmax()))
    return answer


@pytest.mark.parametrize("name", [None, "bard", "clerk"])
def test_a_conversation_from_a_tuned_state_is_the_trainers_model_from_it(
    server: ServerProcess, tuned: Tuned, name: str | None
) -> None:
    """Turn after turn the tokens are those of one run over the whole history that begins with the state."""
    chosen = {} if name is None else {"initial_state": name}
    history: list[int] = []
    for prompt in PROMPTS:
        reply = complete(server, prompt, conversation_id=f"from-{name}", **chosen)
        history += prompt.encode()
        assert tokens(reply) == greedy(tuned.models[name], history)
        history += tokens(reply)
    assert server.http.get(f"/v1/conversations/from-{name}").json()["initial_state"] == name


@pytest.mark.parametrize("name", ["bard", "clerk"])
def test_log_probabilities_are_the_trainers(server: ServerProcess, tuned: Tuned, name: str) -> None:
    """Without a conversation, too, and to the fifth decimal."""
    ids = list(PROMPTS[0].encode())
    reply = complete(server, ids, initial_state=name, echo=True, logprobs=0, max_tokens=0)
    with torch.no_grad():
        x, _ = tuned.models[name](torch.tensor([ids]))
        expected = tuned.models[name].logits(x[0, :-1]).log_softmax(-1).gather(1, torch.tensor(ids[1:]).unsqueeze(1))
    got = reply["choices"][0]["logprobs"]["token_logprobs"][1:]
    assert got == pytest.approx(expected.flatten().tolist(), abs=2e-5)


def test_equal_words_from_different_states_are_different_histories(server: ServerProcess) -> None:
    """Three conversations of the same tokens, interleaved, never see each other's states."""
    chosen: dict[str, dict[str, str]] = {
        "zero": {},
        "bard": {"initial_state": "bard"},
        "clerk": {"initial_state": "clerk"},
    }
    for prompt in PROMPTS:
        for name, field in chosen.items():
            complete(server, prompt, conversation_id=f"same-{name}", max_tokens=0, **field)
    server.restart()
    answers = [complete(server, "!", conversation_id=f"same-{name}", logprobs=0) for name in chosen]
    whole = [complete(server, "".join(PROMPTS) + "!", logprobs=0, **field) for field in chosen.values()]
    logprobs = [reply["choices"][0]["logprobs"]["token_logprobs"] for reply in answers]
    assert [tokens(reply) for reply in answers] == [tokens(reply) for reply in whole]
    assert logprobs == [reply["choices"][0]["logprobs"]["token_logprobs"] for reply in whole]
    assert len({tuple(values) for values in logprobs}) == 3


def test_killed_between_turns_it_goes_on_the_same(server: ServerProcess) -> None:
    """Killed after each turn and started again, every token equals the uninterrupted conversation's."""

    def talk(conversation_id: str, kill: bool) -> list[list[int]]:
        answers, resumes = [], []
        for number, prompt in enumerate(PROMPTS):
            chosen = {"initial_state": "bard"} if number == 0 else {}
            reply = complete(server, prompt, conversation_id=conversation_id, **chosen)
            answers.append(tokens(reply))
            resumes.append(reply["conversation"]["resume"])
            if kill:
                server.restart()
        assert resumes[0] == "new"
        if kill:
            assert set(resumes[1:]) <= {"restored", "replayed"}
        return answers

    assert talk("killed", kill=True) == talk("uninterrupted", kill=False)


def test_a_lost_checkpoint_is_replayed_from_the_tuned_state(tuned: Tuned, tmp_path: Path) -> None:
    """Without any stored state the log leads from the same beginning to the same tokens."""
    options = (*OPTIONS, "--initial-states", str(tuned.states))
    with ServerProcess(tuned.model, tmp_path / "data", *options, "--state-url", "memory:") as server:
        complete(server, PROMPTS[0], conversation_id="lost", initial_state="clerk")
        server.restart()
        reply = complete(server, PROMPTS[1], conversation_id="lost")
        assert reply["conversation"]["resume"] == "replayed"
        history = list(PROMPTS[0].encode())
        history += greedy(tuned.models["clerk"], history) + list(PROMPTS[1].encode())
        assert tokens(reply) == greedy(tuned.models["clerk"], history)


def test_states_are_listed_and_what_is_not_there_is_refused_by_name(server: ServerProcess) -> None:
    """The list gives names and fingerprints; 400 names the field and what there is."""
    listed = server.http.get("/v1/initial_states").json()
    assert [state["id"] for state in listed["data"]] == ["bard", "clerk"]
    assert len({state["fingerprint"] for state in listed["data"]}) == 2
    message = {"messages": [{"role": "user", "content": "hi"}]}
    for route, body in (
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/completions", {"prompt": "x", "conversation_id": "c"}),
        ("/v1/chat/completions", message),
        ("/v1/chat/completions", {**message, "conversation_id": "c"}),
        ("/v1/conversations", {"id": "c"}),
    ):
        response = server.http.post(route, json={**body, "initial_state": "poet"})
        assert response.status_code == 400
        assert error_of(response)["param"] == "initial_state"
        assert "bard, clerk" in error_of(response)["message"]
    assert server.http.get("/v1/conversations/c").status_code == 404


def test_what_a_conversation_began_from_is_fixed(server: ServerProcess) -> None:
    """It may be named again; another one is a conflict, and so is one where it began from nothing."""
    made = server.http.post("/v1/conversations", json={"id": "fixed", "initial_state": "bard"}).json()
    assert made["initial_state"] == "bard"
    server.http.post("/v1/conversations", json={"id": "plain"})
    for _ in range(2):
        complete(server, "x", conversation="fixed", initial_state="bard")
    for conversation_id, name in (("fixed", "clerk"), ("plain", "bard")):
        body = {"prompt": "x", "conversation": conversation_id, "initial_state": name}
        response = server.http.post("/v1/completions", json=body)
        assert response.status_code == 409
        assert error_of(response)["code"] == "initial_state_conflict"
    assert server.http.get("/v1/conversations/fixed").json()["version"] == 2


def test_another_content_under_its_name_is_never_taken_for_it(tuned: Tuned, tmp_path: Path) -> None:
    """A replaced or missing file is a conflict for what began from it, and no hindrance for anybody else."""
    states = tmp_path / "states"
    states.mkdir()
    (states / "bard.safetensors").write_bytes((tuned.states / "bard.safetensors").read_bytes())
    options = (*OPTIONS, "--initial-states", str(states))
    with ServerProcess(tuned.model, tmp_path / "data", *options) as server:
        complete(server, PROMPTS[0], conversation_id="begun", initial_state="bard")
        complete(server, PROMPTS[0], conversation_id="plain")
        original = (states / "bard.safetensors").rename(tmp_path / "kept.safetensors")
        for content in (tuned.states / "clerk.pth", None):
            server.stop()
            (states / "bard.pth").unlink(missing_ok=True)
            if content is not None:
                (states / "bard.pth").write_bytes(content.read_bytes())
            server.start()
            for chosen in ({}, {"initial_state": "bard"} if content else {}):
                body = {"prompt": PROMPTS[1], "conversation_id": "begun", **chosen}
                response = server.http.post("/v1/completions", json=body)
                assert response.status_code == 409
                assert error_of(response)["code"] == "initial_state_mismatch"
            complete(server, PROMPTS[1], conversation_id="plain")
        server.stop()
        original.rename(states / "bard.safetensors")
        server.start()
        assert complete(server, PROMPTS[1], conversation_id="begun")["conversation"]["version"] == 2


def test_a_state_of_another_model_keeps_the_server_from_starting(tuned: Tuned, tmp_path: Path) -> None:
    """It says which file, and why."""
    (tmp_path / "states").mkdir()
    save_file({"blocks.0.att.time_state": torch.zeros(4, 64, 64)}, tmp_path / "states" / "alien.safetensors")
    server = ServerProcess(tuned.model, tmp_path / "data", "--initial-states", str(tmp_path / "states"))
    with pytest.raises(AssertionError, match="the server ended"):
        server.start()
    server.http.close()
    log = server.log_path.read_text()
    assert "alien.safetensors" in log
    assert "blocks.1.att.time_state is missing" in log


def test_a_conversation_takes_the_name_of_its_beginning_along(
    tuned: Tuned, server: ServerProcess, tmp_path: Path
) -> None:
    """Imported elsewhere it begins from the same content, whatever that is called there; else it is refused."""
    (tmp_path / "states").mkdir()
    shutil.copy(tuned.states / "bard.safetensors", tmp_path / "states" / "poet.safetensors")
    options = (*OPTIONS, "--initial-states", str(tmp_path / "states"))
    with ServerProcess(tuned.model, tmp_path / "data", *options) as other:
        for name, status in (("bard", 200), ("clerk", 409)):
            complete(server, PROMPTS[0], conversation_id=f"to-move-{name}", initial_state=name)
            path = f"/v1/conversations/to-move-{name}/export"
            for include_state in (True, False):
                file = server.http.post(path, json={"include_state": include_state}).content
                answer = other.http.post("/v1/conversations/import", content=file)
                assert answer.status_code == status
                if status == 409:
                    assert error_of(answer)["code"] == "initial_state_mismatch"
                    continue
                moved = complete(other, PROMPTS[1], conversation=answer.json()["id"], initial_state="poet")
                assert tokens_of(moved) == tokens_of(
                    complete(server, PROMPTS[1], conversation=fork_of(server, f"to-move-{name}"))
                )


def tokens_of(reply: dict[str, Any]) -> list[int]:
    """What was generated."""
    token_ids: list[int] = reply["choices"][0]["token_ids"]
    return token_ids


def fork_of(server: ServerProcess, conversation_id: str) -> str:
    """Return a copy, so that the original stays where it is."""
    name: str = server.http.post(f"/v1/conversations/{conversation_id}/fork", json={}).json()["id"]
    return name
