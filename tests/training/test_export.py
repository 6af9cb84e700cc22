from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from engine.tokenizer.loading import load as load_tokenizer
from training.__main__ import main
from training.checkpoint import checkpoints
from training.config import TrainConfig
from training.export import load_model

CONFIG = """
[model]
vocab_size = 300
width = 32
num_layers = 1
head_size = 16
[data]
row_tokens = 32
rows_per_step = 2
[[data.sources]]
name = "short"
made = "short"
num_documents = 20
[run]
num_steps = 2
eval_every = 1
eval_rows = 1
checkpoint_every = 1
keep_checkpoints = 2
"""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of two steps, made from the command line."""
    (tmp_path / "train.toml").write_text(CONFIG)
    main(["train", "--config", str(tmp_path / "train.toml"), "--run", str(tmp_path / "run")])
    return tmp_path / "run"


def test_a_model_of_bytes_has_no_tokenizer_file(tmp_path: Path) -> None:
    """Its directory can be served and read as it is: 256 rows mean bytes."""
    config = CONFIG.replace("vocab_size = 300", "vocab_size = 256").replace("[data]", '[data]\ntokenizer = "bytes"')
    (tmp_path / "train.toml").write_text(config)
    main(["train", "--config", str(tmp_path / "train.toml"), "--run", str(tmp_path / "run")])
    main(["export", "--run", str(tmp_path / "run"), "--to", str(tmp_path / "model")])
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"model.safetensors", "sostenuto.json"}
    assert load_tokenizer("auto", tmp_path / "model", 256).encode("é") == list("é".encode())


def test_from_text_to_an_answer(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The commands take one from nothing to a directory to serve, its measures and its words."""
    directory = tmp_path / "model"
    main(["export", "--run", str(run_dir), "--to", str(directory)])
    assert {path.name for path in directory.iterdir()} == {"model.safetensors", "tokenizer.json", "sostenuto.json"}
    text = tmp_path / "text.txt"
    text.write_text("Hello there.")
    capsys.readouterr()
    main(["eval", "--model", str(directory), "--text", str(text), "--recall", "2"])
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert results.keys() == {
        "bits_per_byte/text.txt",
        "perplexity/text.txt",
        *(f"{measure}/{distance}" for measure in ("recall", "recall_of_known_values") for distance in (1, 3, 5, 8, 12)),
    }
    assert 0 < results["bits_per_byte/text.txt"] < 20
    config = ["--config", str(tmp_path / "train.toml"), "--run", str(run_dir)]
    main(["eval", "--model", str(directory), *config])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]).keys() == {"held_out/short/bits_per_byte"}
    main(["curves", "--run", str(run_dir), "--to", str(tmp_path / "curves.png")])
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    main(["generate", "--model", str(directory), "--prompt", "Hi", "--chat", "--max-tokens", "3"])


def test_exported_weights_are_the_trained_ones(run_dir: Path, tmp_path: Path) -> None:
    """An export holds the newest checkpoint's weights under the official names, in the type asked for."""
    main(["export", "--run", str(run_dir), "--to", str(tmp_path), "--dtype", "float32"])
    exported, trained = load_model(tmp_path), load_model(checkpoints(run_dir)[-1])
    assert exported.shape == trained.shape
    for one, other in zip(exported.parameters(), trained.parameters(), strict=True):
        assert torch.equal(one, other)


def test_old_checkpoints_go_and_none_is_partial(run_dir: Path) -> None:
    """The newest are kept, and what bears a step's name is complete."""
    assert [path.name for path in checkpoints(run_dir)] == ["step-00000001", "step-00000002"]
    for path in checkpoints(run_dir):
        assert {file.name for file in path.iterdir()} == {"model.safetensors", "trainer.safetensors", "trainer.json"}
    assert not list(run_dir.glob(".*"))


def test_export_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    """The error names the directory."""
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        main(["export", "--run", str(tmp_path), "--to", str(tmp_path)])


def test_a_misspelt_setting_is_refused(tmp_path: Path) -> None:
    """Unknown keys of a configuration are errors that name them."""
    path = tmp_path / "train.toml"
    path.write_text(CONFIG.replace("num_steps", "steps"))
    with pytest.raises(ValueError, match="steps"):
        TrainConfig.load(path)
