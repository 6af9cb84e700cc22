"""SIGKILL at any moment: what was committed is there, what was not has left no trace, and the talk goes on the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.talk import LINES, Reply, kill_while_streaming, post_turn, say, talk, turn_body, version
from tests.server_process import ServerProcess


@pytest.fixture
def uninterrupted(server: ServerProcess) -> list[Reply]:
    """The same conversation, held without any fault, on the same server."""
    return talk(server, "uninterrupted")


def test_killed_between_turns_it_continues_token_for_token(server: ServerProcess, uninterrupted: list[Reply]) -> None:
    """Killed after each of three turns and started again, every later token equals the uninterrupted run's."""
    replies = []
    for seed, line in enumerate(LINES):
        replies.append(say(server, line, "killed", seed))
        if seed < 3:
            server.restart()
    assert [reply.token_ids for reply in replies] == [reply.token_ids for reply in uninterrupted]
    assert [reply.version for reply in replies] == [1, 2, 3, 4, 5]
    assert all(reply.resume in ("restored", "replayed") for reply in replies[1:4])


def test_a_turn_broken_by_a_kill_leaves_no_trace(server: ServerProcess, uninterrupted: list[Reply]) -> None:
    """Killed while a turn streams, the conversation is where it was; said again, the turn gives the same tokens."""
    for seed, line in enumerate(LINES[:2]):
        say(server, line, "broken", seed)
    kill_while_streaming(server, turn_body(LINES[2], "broken", seed=2, ignore_eos=True, max_tokens=8000))
    server.start()
    assert version(server, "broken") == 2
    replies = [say(server, LINES[seed], "broken", seed) for seed in range(2, len(LINES))]
    assert [reply.token_ids for reply in replies] == [reply.token_ids for reply in uninterrupted[2:]]
    assert [reply.version for reply in replies] == [3, 4, 5]


def test_a_kill_right_after_the_reply_loses_nothing(server: ServerProcess) -> None:
    """A turn whose reply arrived is there after a kill, whether or not its state was checkpointed yet."""
    for round_number in range(2):
        reply = say(server, LINES[1], "acked", round_number)
        server.kill()
        server.start()
        assert version(server, "acked") == reply.version == round_number + 1


@pytest.mark.parametrize("damage", ["removed", "truncated", "flipped"])
def test_a_damaged_checkpoint_is_replayed_and_said_so(tiny_model: Path, tmp_path: Path, damage: str) -> None:
    """A checkpoint that is gone or damaged is never loaded: the log is replayed, said so, to the same tokens."""
    with ServerProcess(tiny_model, tmp_path / "data") as server:
        expected = talk(server, "intact")
        for seed, line in enumerate(LINES[:3]):
            say(server, line, "damaged", seed)
        server.stop()
        for path in checkpoint_files(tmp_path / "data"):
            spoil(path, damage)
        server.start()
        reply = say(server, LINES[3], "damaged", 3)
        assert reply.resume == "replayed"
        assert reply.token_ids == expected[3].token_ids
        assert say(server, LINES[4], "damaged", 4).token_ids == expected[4].token_ids


def checkpoint_files(data_dir: Path) -> list[Path]:
    """Return every stored state below `data_dir`."""
    files = [path for path in (data_dir / "states").rglob("*") if path.is_file() and path.stat().st_size > 1000]
    assert files, "no checkpoint was written"
    return files


def spoil(path: Path, damage: str) -> None:
    """Remove, truncate or change one byte of a file."""
    blob = bytearray(path.read_bytes())
    if damage == "removed":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(blob[: len(blob) // 2])
    else:
        blob[len(blob) * 2 // 3] ^= 1
        path.write_bytes(blob)


def test_an_unknown_conversation_is_never_a_fresh_start(server: ServerProcess) -> None:
    """`conversation` names one that exists; anything else is 404, and a deleted one is 410."""
    body = {**turn_body(LINES[0], "x", 0), "conversation": "never-said"}
    del body["conversation_id"]
    assert post_turn(server, body).status_code == 404
    say(server, LINES[0], "short-lived", 0)
    assert server.http.delete("/v1/conversations/short-lived").status_code == 200
    assert post_turn(server, turn_body(LINES[1], "short-lived", 1)).status_code == 410


def test_states_kept_in_another_dtype_are_replayed_and_counted(tiny_model: Path, tmp_path: Path) -> None:
    """A server with float16 states remembers by them, and loads no float32 one: the turn says so, and it is counted."""
    with ServerProcess(tiny_model, tmp_path / "data", "--state-dtype", "float16") as halves:
        expected = talk(halves, "uninterrupted")
    with ServerProcess(tiny_model, tmp_path / "data") as server:
        for seed, line in enumerate(LINES[:2]):
            say(server, line, "moved", seed)
        server.stop()  # in peace: a kill may come before the state is written
    with ServerProcess(tiny_model, tmp_path / "data", "--state-dtype", "float16") as halves:
        reply = say(halves, LINES[2], "moved", 2)
        assert (reply.resume, reply.version) == ("replayed", 3)
        assert "rwkv_checkpoints_rejected_total 1.0" in halves.http.get("/metrics").text
        halves.stop()
        halves.start()
        assert say(halves, LINES[3], "moved", 3).resume == "restored"
        assert [say(halves, line, "again", seed) for seed, line in enumerate(LINES)] == expected
