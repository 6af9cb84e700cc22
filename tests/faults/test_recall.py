"""What the bundled model was told is answered the same before and after whatever happens to the server."""

from __future__ import annotations

from pathlib import Path

from tests.redis_server import RedisServer
from tests.server_process import ServerProcess, redis_options
from training.__main__ import main

MODEL = Path(__file__).resolve().parents[2] / "models/default"
NUM_DIALOGUES = 10


def test_recall_is_the_same_after_a_kill_and_after_a_trip_through_redis(tmp_path: Path) -> None:
    """Asked at once, after SIGKILL and restart, and by another server on the same Redis: not one answer differs."""

    def recall(server: ServerProcess, name: str, *options: str) -> str:
        path = tmp_path / f"{name}.jsonl"
        probes = ("--recall", str(NUM_DIALOGUES), "--distances", "3", "--answers", str(path))
        main(["eval", "--url", server.url, *probes, "--conversations", name, *options])
        return path.read_text()

    with RedisServer(tmp_path / "redis") as redis:
        options = redis_options(redis.url)
        with ServerProcess(MODEL, tmp_path / "first", *options) as first:
            before = recall(first, "before")
            assert len(before.splitlines()) == 2 * NUM_DIALOGUES
            for name in ("killed", "moved"):
                assert recall(first, name, "--tell") == ""
            first.restart()
            assert recall(first, "killed", "--ask") == before
            first.stop()
        with ServerProcess(MODEL, tmp_path / "second", *options) as second:
            assert recall(second, "moved", "--ask") == before
