"""`sostenuto chat` against real servers: through pipes, and on a terminal."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.chat.terminal import PATIENCE_SECONDS, Terminal
from tests.conftest import ROOT
from tests.redis_server import free_port
from tests.server.speaking_server import SpeakingServer
from tests.server_process import ServerProcess

LINES = {"User: Hello.\n\nAssistant:": " Good day.", "User: And now?\n\nAssistant:": " Now we wait."}


@pytest.fixture(scope="module")
def speaking(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SpeakingServer]:
    """A server whose model says two things."""
    with SpeakingServer(tiny_model, tmp_path_factory.mktemp("chat") / "data", LINES) as server:
        yield server


@pytest.fixture(scope="module")
def babbling(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that can be killed, whose model never comes to an end."""
    with ServerProcess(tiny_model, tmp_path_factory.mktemp("babble") / "data") as server:
        yield server


def piped(url: str, *lines: str, conversation: str | None = None) -> list[str]:
    """Say lines through a pipe; returns what came out, without the line that says where we are."""
    options = [] if conversation is None else ["--conversation", conversation]
    done = subprocess.run(
        [sys.executable, "-m", "chat", "--url", url, *options],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=PATIENCE_SECONDS,
        check=True,
    )
    assert done.stderr == ""
    where, *rest = done.stdout.splitlines()
    assert "version" in where
    return rest


def test_each_line_is_a_turn(speaking: SpeakingServer) -> None:
    """Answers come as lines; the end of the input is the end."""
    assert piped(speaking.url, "Hello.", "And now?") == ["Good day.", "Now we wait."]


def test_who_joins_sees_what_was_said(speaking: SpeakingServer) -> None:
    """A conversation that is not there begins; one that is goes on."""
    assert piped(speaking.url, "Hello.", conversation="joined") == ["Good day."]
    assert piped(speaking.url, "And now?", conversation="joined") == ["> Hello.", "Good day.", "Now we wait."]


def test_forks_and_rewinds(speaking: SpeakingServer) -> None:
    """A fork leaves its origin alone; going back forgets."""
    told = piped(speaking.url, "Hello.", "/fork", "And now?", "/id", "/rewind 1", conversation="forked")
    assert [line for line in told if not line.startswith("(")] == [
        "Good day.",
        *("> Hello.", "Good day."),
        "Now we wait.",
        *("> Hello.", "Good day."),
    ]
    where = [line for line in told if line.startswith("(")]
    assert [line.split(", ")[1] for line in where] == ["version 1", "version 2", "version 3"]
    assert not any("(forked," in line for line in where)
    assert piped(speaking.url, "/fork 0", conversation="forked")[-1].endswith("test)")


def test_a_conversation_goes_through_a_file(speaking: SpeakingServer, tmp_path: Path) -> None:
    """Written once, not over something; and read."""
    path = tmp_path / "some.sostenuto"
    told = piped(speaking.url, "Hello.", f"/export {path}", f"/export {path}", f"/import {path}", "And now?")
    assert told[1].startswith("(wrote ")
    assert told[2] == f"error: {path}: File exists"
    assert told[3].startswith("(conv_")
    assert told[4:] == ["> Hello.", "Good day.", "Now we wait."]


def test_what_was_said_can_be_taken_back(speaking: SpeakingServer) -> None:
    """By the id that /items shows."""
    piped(speaking.url, "Hello.", "And now?", conversation="edited")
    listed = [line for line in piped(speaking.url, "/items", conversation="edited") if line.startswith("msg_")]
    assert [line.split("  ")[1] for line in listed] == [
        "user: Hello.",
        "assistant: Good day.",
        "user: And now?",
        "assistant: Now we wait.",
    ]
    assert piped(speaking.url, f"/delete {listed[2].split()[0]}", conversation="edited")[-1] == "(deleted; version 3)"
    assert piped(speaking.url, conversation="edited") == ["> Hello.", "Good day.", "Now we wait."]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/nonsense", "there is no command /nonsense"),
        ("/rewind", "usage: /rewind VERSION"),
        ("/rewind x", "usage: /rewind VERSION"),
        ("/rewind 7", "version_not_found"),
        ("/fork 1 2", "usage: /fork [VERSION]"),
        ("/delete msg_none", "item_not_found"),
        ("/export", "usage: /export FILE [state]"),
        ("/export /tmp/x everything", "usage: /export FILE [state]"),
        ("/import /no/such/file", "No such file or directory"),
        (f"/import {__file__}", "invalid_export"),
        ("/new a b", "usage: /new [ID]"),
        ("/new white%space", "invalid_value"),
    ],
)
def test_mistakes_are_told_in_one_line(speaking: SpeakingServer, line: str, told: str) -> None:
    """And it goes on."""
    first, second = piped(speaking.url, line, "Hello.")
    assert first.startswith("error: ")
    assert told in first
    assert second == "Good day."


def test_a_server_that_is_not_there_is_told(tmp_path: Path) -> None:
    """One line, and status 1."""
    done = subprocess.run(
        [sys.executable, "-m", "chat", "--url", f"http://127.0.0.1:{free_port()}"],
        input="",
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == 1
    assert done.stdout.startswith("error: the server does not answer")
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


def test_the_key_comes_from_the_environment() -> None:
    """Where the server's own is; it is sent, and a refusal told."""
    seen: list[str | None] = []

    class Refusal(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append(self.headers["authorization"])
            body = b'{"error": {"message": "No.", "type": "x", "param": null, "code": "invalid_api_key"}}'
            self.send_response(401)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Refusal) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        done = subprocess.run(
            [sys.executable, "-m", "server", "chat", "--url", f"http://127.0.0.1:{server.server_port}"],
            env={**os.environ, "SOSTENUTO_API_KEY": "-secret"},
            input="",
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=PATIENCE_SECONDS,
        )
        server.shutdown()
        thread.join()
    assert done.stdout == "error: No (invalid_api_key)\n"
    assert seen == ["Bearer -secret"]


# -- on a terminal ----------------------------------------------------------------------------------------------------


def test_a_terminal_has_a_prompt_and_an_end(speaking: SpeakingServer) -> None:
    """History on joining, an answer, Ctrl-C at the prompt, Ctrl-D."""
    piped(speaking.url, "Hello.", conversation="terminal")
    with Terminal("--url", speaking.url, "--conversation", "terminal") as terminal:
        assert "Hello." in terminal.expect("Good day.")
        terminal.expect("(/help lists commands")
        terminal.expect("> ")
        terminal.type("\x03")
        terminal.expect("(Ctrl-D or /quit leaves)")
        terminal.type("And now?\r")
        terminal.expect("Now we wait.")
        terminal.expect("> ")
        terminal.type("/help\r")
        terminal.expect("/rewind VERSION")
        terminal.expect("> ")
        assert terminal.leave() == 0


def test_nobody_is_talked_past(speaking: SpeakingServer) -> None:
    """What somebody else said meanwhile is shown first, and nothing is said."""
    with speaking.http() as http, Terminal("--url", speaking.url, "--conversation", "shared") as terminal:
        terminal.expect("> ")
        http.post("/v1/conversations/shared/items", json={"items": [{"role": "user", "content": "Me first."}]})
        terminal.type("Hello.\r")
        terminal.expect("came to version 1")
        terminal.expect("Me first.")
        terminal.expect("> ")
        terminal.type("Hello.\r")
        terminal.expect("Good day.")
        assert http.get("/v1/conversations/shared").json()["version"] == 2


def test_ctrl_c_stops_an_answer(babbling: ServerProcess) -> None:
    """The turn is not applied, which is told; the conversation goes on."""
    with Terminal("--url", babbling.url, "--conversation", "stopped", "--max-tokens", "8000") as terminal:
        terminal.expect("> ")
        terminal.type("Talk.\r")
        terminal.expect("Talk.\r\n")
        terminal.expect("�")
        terminal.type("\x03")
        terminal.expect("(stopped: the turn was not applied; still at version 0)")
        terminal.expect("> ")
    with Terminal("--url", babbling.url, "--conversation", "stopped", "--max-tokens", "8") as terminal:
        terminal.expect("> ")
        terminal.type("Talk.\r")
        terminal.expect("(cut off: the limit of tokens was reached; version 1)")


def test_a_killed_server_is_waited_for(babbling: ServerProcess) -> None:
    """What became of the turn is told when it is back."""
    with Terminal("--url", babbling.url, "--conversation", "killed", "--max-tokens", "8000") as terminal:
        terminal.expect("> ")
        terminal.type("Talk.\r")
        terminal.expect("Talk.\r\n")
        terminal.expect("�")
        babbling.restart()
        terminal.expect("error: the server does not answer")
        terminal.expect("(reconnected: the turn was not applied; still at version 0)")
        terminal.expect("> ")
