"""`sostenuto eval` in process and over HTTP: the same model, the same numbers."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server_process import ServerProcess
from training.__main__ import main
from training.dialogues import recall_probe

MODEL = Path(__file__).resolve().parents[2] / "models/default"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server of the bundled model, with the weights in the trainer's precision."""
    with ServerProcess(MODEL, tmp_path_factory.mktemp("report") / "data", "--dtype", "float32") as process:
        yield process


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that name a text of some windows, passages and questions, all made by our generator."""
    directory = tmp_path_factory.mktemp("measured")
    talks = [" ".join(message["content"] for message in recall_probe(5, 5, n).messages) for n in range(8)]
    with gzip.open(directory / "talk.txt.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(talks) + " Naïve café 猫.")
    passages = [json.dumps({"text": talk.rstrip("?. ")}) for talk in talks[:4]]
    (directory / "passages.jsonl").write_text("\n".join(passages))
    questions = [
        {"context": talk, "choices": [" I don't know.", " Your name is blue.", " Yes"], "answer": n % 3}
        for n, talk in enumerate(talks[:3])
    ]
    (directory / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    names = {"--text": "talk.txt.gz", "--lambada": "passages.jsonl", "--choices": "questions.jsonl"}
    return [part for option, name in names.items() for part in (option, str(directory / name))]


def report(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    """Return the JSON object that an evaluation ends with."""
    capsys.readouterr()
    main(["eval", *options])
    results: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return results


def test_a_server_gives_the_same_numbers(
    server: ServerProcess, measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Bits per byte, perplexity, LAMBADA by both protocols and multiple choice agree to 1e-4, whoever tokenizes."""
    here = report(capsys, "--model", str(MODEL), *measured)
    there = report(capsys, "--url", server.url, *measured)
    assert {name.split("/")[0] for name in here} == {"bits_per_byte", "perplexity", "lambada", "choices"}
    assert len(here) == 8
    assert there == pytest.approx(here, rel=1e-4, abs=1e-4)
    with_tokenizer = ("--url", server.url, "--model", str(MODEL), "--served-model", "test", *measured[:2])
    assert report(capsys, *with_tokenizer).items() <= there.items()


def test_recall_is_asked_over_http_as_in_process(
    server: ServerProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same dialogues, the same answers; told first and asked later, too."""
    probes = ("--recall", "8", "--distances", "3")
    here = report(capsys, "--model", str(MODEL), *probes, "--answers", str(tmp_path / "here"))
    there = report(capsys, "--url", server.url, *probes, "--answers", str(tmp_path / "there"))
    assert there == here
    assert here["recall/3"] >= 0.5
    later = ("--url", server.url, *probes, "--conversations", "later")
    assert report(capsys, *later, "--tell") == {}
    assert report(capsys, *later, "--ask", "--answers", str(tmp_path / "later")) == there
    assert (tmp_path / "later").read_text() == (tmp_path / "there").read_text()
    assert len((tmp_path / "later").read_text().splitlines()) == 16


@pytest.mark.parametrize(
    "options",
    [
        ["--text", "x"],
        ["--model", "m", "--tell"],
        ["--model", "m", "--conversations", "c"],
        ["--url", "http://127.0.0.1:9", "--ask"],
        ["--url", "http://127.0.0.1:9", "--config", "c"],
    ],
    ids=" ".join,
)
def test_what_does_not_go_together_is_refused(options: list[str]) -> None:
    """Before anything is loaded or asked."""
    with pytest.raises(SystemExit, match="eval:"):
        main(["eval", *options])


def test_a_refusal_of_the_server_is_told(server: ServerProcess, measured: list[str]) -> None:
    """With the server's words, not as a number."""
    from training.served import RefusedError

    with pytest.raises(RefusedError, match="model_not_found"):
        main(["eval", "--url", server.url, "--served-model", "another", *measured])
