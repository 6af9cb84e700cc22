"""What a long chat costs: the first token of turn 20 beside that of turn 1, three ways to go on; and a shared prompt.

Over HTTP, with the bundled model, because a client that resends its history sends text, and only a trained model's
text encodes to the tokens it was sampled as. Part of `make bench`; alone: `python -m tests.benchmarks.turns_bench`.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from server.settings import DEFAULT_MODEL
from tests.server_process import ServerProcess

NUM_TURNS = 20
MAX_TOKENS = 16
SYSTEM_TOKENS = 4000
LINE = "Tell me something about the number {}."


@dataclass(frozen=True)
class Answered:
    """An answer, and when its first token came."""

    first_token_seconds: float
    text: str
    response_id: str = ""


class TurnBench:
    """Holds chats with one server, the three ways in turns."""

    def __init__(self, directory: Path, rounds: int) -> None:
        self._directory = directory
        self._rounds = rounds

    def run(self) -> dict[str, object]:
        """Return `turn_20_over_turn_1` by way, and `second_over_first_system_prompt`: medians of the rounds' ratios."""
        with ServerProcess(DEFAULT_MODEL, self._directory / "turns") as server:
            ways = {"conversation": Conversation, "previous_response_id": Chain, "resent_history": Resent}
            ratios: dict[str, list[float]] = {name: [] for name in ways}
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            for _ in tqdm(range(self._rounds), desc="turns"):
                for name, way in ways.items():
                    times = [answered.first_token_seconds for answered in hold(way(server.http), NUM_TURNS)]
                    ratios[name].append(times[-1] / times[0])
                    seconds[name].append(times[-1])
            shared = [self._shared_prompt(server.http) for _ in tqdm(range(self._rounds), desc="system prompt")]
        return {
            "turn_20_over_turn_1": {name: round(statistics.median(values), 2) for name, values in ratios.items()},
            "turn_20_ttft_seconds": {name: round(statistics.median(values), 4) for name, values in seconds.items()},
            "second_over_first_system_prompt": {
                str(SYSTEM_TOKENS): round(statistics.median(second / first for first, second in shared), 4)
            },
        }

    def _shared_prompt(self, http: httpx.Client) -> tuple[float, float]:
        """Return the time to the first token of the first client with a system prompt, and of the second."""
        words = f"{uuid.uuid4().hex} " + " ".join(LINE.format(number) for number in range(SYSTEM_TOKENS))
        token_ids = http.post("/tokenize", json={"prompt": words}).json()["tokens"][:SYSTEM_TOKENS]
        system = {"role": "system", "content": http.post("/detokenize", json={"tokens": token_ids}).json()["prompt"]}
        first, second = (
            chat(http, messages=[system, {"role": "user", "content": LINE.format(number)}]) for number in (1, 2)
        )
        return first.first_token_seconds, second.first_token_seconds


def hold(say: Callable[[str], Answered], num_turns: int) -> Iterator[Answered]:
    """Yield the answers of one chat."""
    for number in range(num_turns):
        yield say(LINE.format(10 + number))


class Conversation:
    """Goes on by `conversation_id`."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http
        self._id = uuid.uuid4().hex

    def __call__(self, text: str) -> Answered:
        """Say `text`."""
        return chat(self._http, messages=[{"role": "user", "content": text}], conversation_id=self._id)


class Resent:
    """Goes on by sending everything again."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http
        # Its own first words, so that no chat finds the states of another.
        self._messages = [{"role": "system", "content": f"Chat {uuid.uuid4().hex}."}]

    def __call__(self, text: str) -> Answered:
        """Say `text`."""
        self._messages.append({"role": "user", "content": text})
        answered = chat(self._http, messages=self._messages)
        self._messages.append({"role": "assistant", "content": answered.text})
        return answered


class Chain:
    """Goes on by `previous_response_id`."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http
        self._previous: str | None = None

    def __call__(self, text: str) -> Answered:
        """Say `text`."""
        body = {"input": text, "previous_response_id": self._previous, "max_output_tokens": MAX_TOKENS}
        answered = stream(
            self._http,
            "/v1/responses",
            body,
            lambda event: event.get("delta", "") if event["type"] == "response.output_text.delta" else "",
        )
        self._previous = answered.response_id
        return answered


def chat(http: httpx.Client, **body: Any) -> Answered:
    """Return the answer to a chat request."""
    return stream(
        http,
        "/v1/chat/completions",
        {"max_tokens": MAX_TOKENS, **body},
        lambda chunk: (chunk["choices"][0]["delta"].get("content") or "") if chunk["choices"] else "",
    )


def stream(http: httpx.Client, path: str, body: dict[str, Any], text_of: Callable[[dict[str, Any]], str]) -> Answered:
    """Return a streamed answer; raises `RuntimeError` if it has no token, or is an error."""
    started_at = time.perf_counter()
    first: float | None = None
    text, response_id = "", ""
    with http.stream("POST", path, json={"stream": True, "temperature": 0, "min_tokens": 2, **body}) as response:
        if response.status_code != 200:
            raise RuntimeError(response.read().decode())
        for line in response.iter_lines():
            data = line.removeprefix("data: ")
            if data == line or data == "[DONE]":
                continue
            event = json.loads(data)
            if piece := text_of(event):
                first = first or time.perf_counter() - started_at
                text += piece
            response_id = event.get("response", {}).get("id", response_id)
    if first is None:
        raise RuntimeError(f"an answer without a token: {body}")
    return Answered(first, text, response_id)


def main() -> None:
    """Measure in three rounds, and print one JSON line."""
    with tempfile.TemporaryDirectory(prefix="sostenuto-bench-") as directory:
        print(json.dumps(TurnBench(Path(directory), rounds=3).run()))


if __name__ == "__main__":
    main()
