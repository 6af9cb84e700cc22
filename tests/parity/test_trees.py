"""Random trees of responses and conversations against a dictionary: never a wrong token, never a silent fresh start.

The dictionary holds, for every response and conversation, what was said as text and as tokens. What the server answers
must be what a run without any history answers to all of it at once, whatever happened in between: branches, edits,
deletions, kills, states that were evicted from memory or lost from the store.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from tests.server_process import ServerProcess

STOPS = ["\n\nUser:", "\nUser:", "\n\nSystem:"]
STATE_BYTES = 13_824  # of the tiny model
MAX_TOKENS = 6

texts = st.text("abc ", min_size=1, max_size=8).map(str.strip).filter(bool)
instructions = st.sampled_from([None, None, "Be kind.", "Be short."])
draws = st.randoms(use_true_random=False)


@dataclass(frozen=True)
class Said:
    """One thing that was said, under the id that the server gave it."""

    item_id: str
    text: str = ""
    token_ids: tuple[int, ...] = ()  # of an answer


@dataclass(frozen=True)
class Node:
    """A history as it must be: what it begins with, and what was said."""

    preamble: str = ""
    said: tuple[Said, ...] = ()

    def prompt(self, text: str) -> bytes:
        """The bytes that the model reads before it answers `text`."""
        parts = [f"System: {self.preamble}".encode()] if self.preamble else []
        for each in self.said:
            parts.append(b"Assistant:" + bytes(each.token_ids) if each.token_ids else f"User: {each.text}".encode())
        return b"\n\n".join([*parts, f"User: {text}".encode(), b"Assistant:"])


@dataclass
class Talk:
    """A conversation: where every version of it leads."""

    versions: list[Node] = field(default_factory=lambda: [Node()])


class Trees(RuleBasedStateMachine):
    """Everything that can be done to responses and conversations."""

    server: ServerProcess
    states: Path

    def __init__(self) -> None:
        super().__init__()
        self.responses: dict[str, Node] = {}
        self.homes: dict[str, str] = {}  # of responses that are turns of a conversation
        self.deleted: list[str] = []
        self.talks: dict[str, Talk] = {}
        self.num_requests = 0

    # -- asking -------------------------------------------------------------------------------------------------------

    def ask(self, method: str, path: str, status: int = 200, **body: Any) -> dict[str, Any]:
        """Return the body of an answer that must have this status."""
        response = self.server.http.request(method, path, json=body or None)
        assert response.status_code == status, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def expected(self, node: Node, text: str, seed: int) -> tuple[int, ...]:
        """What a run over the whole history answers."""
        body = {
            "prompt": list(node.prompt(text)),
            "max_tokens": MAX_TOKENS,
            "seed": seed,
            "stop": STOPS,
            "return_token_ids": True,
        }
        return tuple(self.ask("POST", "/v1/completions", **body)["choices"][0]["token_ids"])

    def respond(self, node: Node, text: str, preamble: str | None, **where: Any) -> Node:
        """Have `text` answered after `node`, check the answer, and return where that leads."""
        self.num_requests += 1
        seed = self.num_requests
        node = replace(node, preamble=preamble or "")
        reply = self.ask(
            "POST",
            "/v1/responses",
            input=text,
            instructions=preamble,
            max_output_tokens=MAX_TOKENS,
            seed=seed,
            include=["message.output_text.logprobs"],
            **where,
        )
        (message,) = reply["output"]
        token_ids = tuple(byte for entry in message["content"][0]["logprobs"] for byte in entry["bytes"])
        assert token_ids == self.expected(node, text, seed)
        self.check_resume(reply["state"])
        inputs = self.ask("GET", f"/v1/responses/{reply['id']}/input_items") if reply["store"] else {"data": [{}]}
        asked = Said(inputs["data"][0].get("id", ""), text)
        after = replace(node, said=(*node.said, asked, Said(message["id"], "", token_ids)))
        if reply["store"]:
            self.responses[reply["id"]] = after
            self.homes[reply["id"]] = where.get("conversation", "")
        return after

    def check_resume(self, state: dict[str, Any] | None) -> None:
        """A history that has tokens is never begun anew, unless the turn says that it reads it all again."""
        if state is not None and state["resume"] == "new" and state["parent_version"] is not None:
            assert state["parent_version"] == 0 or self.is_empty(state["parent_version"])

    def is_empty(self, version: int) -> bool:
        """Say whether some conversation's history is without a turn at `version`."""
        return any(
            version < len(talk.versions) and not any(said.token_ids for said in talk.versions[version].said)
            for talk in self.talks.values()
        )

    # -- responses ----------------------------------------------------------------------------------------------------

    @rule(text=texts, preamble=instructions)
    def begin(self, text: str, preamble: str | None) -> None:
        """A response without a predecessor."""
        self.respond(Node(), text, preamble)

    @precondition(lambda self: self.responses)
    @rule(
        text=texts, preamble=instructions, draw=draws, keeps=st.booleans(), store=st.sampled_from([True, True, False])
    )
    def go_on(self, text: str, preamble: str | None, draw: Any, keeps: bool, store: bool) -> None:
        """A response that continues any other, with its instructions or others."""
        previous = draw.choice(list(self.responses))
        node = self.responses[previous]
        preamble = (node.preamble or None) if keeps else preamble
        self.respond(node, text, preamble, previous_response_id=previous, store=store)

    @precondition(lambda self: self.responses)
    @rule(draw=draws)
    def look(self, draw: Any) -> None:
        """A response is what it was."""
        response_id = draw.choice(list(self.responses))
        reply = self.ask("GET", f"/v1/responses/{response_id}")
        assert (reply["id"], reply["output"][0]["id"]) == (response_id, self.responses[response_id].said[-1].item_id)

    @precondition(lambda self: self.responses)
    @rule(draw=draws)
    def delete_response(self, draw: Any) -> None:
        """It is gone; those that continue it are not."""
        response_id = draw.choice(list(self.responses))
        self.ask("DELETE", f"/v1/responses/{response_id}")
        del self.responses[response_id]
        self.deleted.append(response_id)

    @precondition(lambda self: self.deleted)
    @rule(draw=draws)
    def miss(self, draw: Any) -> None:
        """What is gone is not found, and not continued from nothing."""
        response_id = draw.choice(self.deleted)
        self.ask("GET", f"/v1/responses/{response_id}", 404)
        self.ask("POST", "/v1/responses", 404, input="x", previous_response_id=response_id)

    # -- conversations ------------------------------------------------------------------------------------------------

    @rule()
    def begin_talk(self) -> None:
        """A conversation without turns."""
        self.talks[self.ask("POST", "/v1/conversations", metadata={"a": "b"})["id"]] = Talk()

    @precondition(lambda self: self.talks)
    @rule(text=texts, preamble=instructions, draw=draws)
    def say(self, text: str, preamble: str | None, draw: Any) -> None:
        """A turn, which is a response as well."""
        conversation_id = draw.choice(list(self.talks))
        talk = self.talks[conversation_id]
        talk.versions.append(self.respond(talk.versions[-1], text, preamble, conversation=conversation_id))

    @precondition(lambda self: self.talks)
    @rule(text=texts, draw=draws)
    def add(self, text: str, draw: Any) -> None:
        """Something is said that nobody answers yet."""
        conversation_id = draw.choice(list(self.talks))
        versions = self.talks[conversation_id].versions
        path = f"/v1/conversations/{conversation_id}/items"
        added = self.ask("POST", path, items=[{"role": "user", "content": text}])["data"][0]
        versions.append(replace(versions[-1], said=(*versions[-1].said, Said(added["id"], text))))

    @precondition(lambda self: any(talk.versions[-1].said for talk in self.talks.values()))
    @rule(draw=draws)
    def take_back(self, draw: Any) -> None:
        """An item is deleted."""
        conversation_id = draw.choice([name for name, talk in self.talks.items() if talk.versions[-1].said])
        versions = self.talks[conversation_id].versions
        gone = draw.choice(versions[-1].said)
        self.ask("DELETE", f"/v1/conversations/{conversation_id}/items/{gone.item_id}")
        versions.append(replace(versions[-1], said=tuple(said for said in versions[-1].said if said != gone)))

    @precondition(lambda self: self.talks)
    @rule(draw=draws)
    def rewind(self, draw: Any) -> None:
        """The conversation goes on from any of its versions."""
        conversation_id = draw.choice(list(self.talks))
        versions = self.talks[conversation_id].versions
        version = draw.randrange(len(versions))
        reply = self.ask("POST", f"/v1/conversations/{conversation_id}/rewind", version=version)
        assert reply["version"] == len(versions)
        versions.append(versions[version])

    @precondition(lambda self: self.talks)
    @rule(draw=draws)
    def fork(self, draw: Any) -> None:
        """Another conversation begins with a version of this one; what it says has the same ids."""
        conversation_id = draw.choice(list(self.talks))
        versions = self.talks[conversation_id].versions
        version = draw.randrange(len(versions))
        fork = self.ask("POST", f"/v1/conversations/{conversation_id}/fork", version=version)
        self.talks[fork["id"]] = Talk([Node()] * fork["version"] + [versions[version]])

    @precondition(lambda self: self.talks)
    @rule(draw=draws)
    def list_items(self, draw: Any) -> None:
        """What was said is listed, in order."""
        conversation_id = draw.choice(list(self.talks))
        path = f"/v1/conversations/{conversation_id}/items?order=asc&limit=100"
        ids = [item["id"] for item in self.ask("GET", path)["data"]]
        assert ids == [said.item_id for said in self.talks[conversation_id].versions[-1].said]

    @precondition(lambda self: self.talks)
    @rule(draw=draws)
    def delete_talk(self, draw: Any) -> None:
        """It is gone, and so are the responses that were its turns; its forks are not."""
        conversation_id = draw.choice(list(self.talks))
        self.ask("DELETE", f"/v1/conversations/{conversation_id}")
        self.ask("GET", f"/v1/conversations/{conversation_id}", 410)
        self.ask("POST", "/v1/responses", 410, input="x", conversation=conversation_id)
        del self.talks[conversation_id]
        for response_id in [name for name, home in self.homes.items() if home == conversation_id]:
            if self.responses.pop(response_id, None) is not None:
                self.deleted.append(response_id)

    # -- what happens to servers --------------------------------------------------------------------------------------

    @rule(lost=st.sampled_from(["nothing", "some", "all"]), draw=draws)
    def kill(self, lost: str, draw: Any) -> None:
        """The server is killed, perhaps loses states from its store, and starts again."""
        self.server.kill()
        # One draw, however many files there happen to be: a test case must draw alike when it is tried again.
        chance = random.Random(draw.getrandbits(32))
        for path in sorted(path for path in self.states.rglob("*") if path.is_file()):
            if lost == "all" or (lost == "some" and chance.random() < 0.5):
                path.unlink()
        self.server.start()


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[ServerProcess]:
    """A server whose memory holds four states."""
    with tempfile.TemporaryDirectory() as directory:
        options = ("--hot-state-bytes", str(4 * STATE_BYTES))
        with ServerProcess(tiny_model, Path(directory) / "data", *options) as process:
            Trees.server, Trees.states = process, Path(directory) / "data" / "states"
            yield process


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_random_trees(server: ServerProcess) -> None:
    """Whatever is done in whatever order."""
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Trees,
        settings=settings(
            max_examples=6,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )
