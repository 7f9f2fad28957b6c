"""`senri-hf sae`."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import BuiltIn, tiny_model
from sparse import Letters

from senri_hf import SparseAutoencoder
from senri_hf.commands.main import build_parser, main


def test_the_command_trains_resumes_measures_shows_and_exchanges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked_for = []

    def load(arguments: argparse.Namespace) -> tuple[Any, Any]:
        asked_for.append(arguments.model)
        return tiny_model("llama"), Letters()

    monkeypatch.setattr("senri_hf.commands.sae.load", load)
    text, other = tmp_path / "text.txt", tmp_path / "other.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 40)
    other.write_text("Call me Ishmael. Some years ago, never mind how long precisely. " * 9)
    sizes = ["--piece", "16", "--rows", "4"]
    of_text = ["--text", str(other), *sizes]
    train = ["sae", "train", "--model", "tiny", "--module", "model.layers.1", "--expansion-factor", "2", "--k", "4",
             "--batch-size", "64", "--buffer-size", "400", "--save-every", "4", *sizes]  # fmt: skip
    train += ["--text", str(text), "--output", str(tmp_path / "sae")]
    assert main([*train, "--steps", "4"]) == 0
    assert main([*train, "--steps", "8", "--resume"]) == 0
    sae = SparseAutoencoder.from_pretrained(tmp_path / "sae")
    assert sae.config.hook_name == "model.layers.1" and sae.W_dec.shape == (64, 32)
    training = json.loads((tmp_path / "sae" / "training.json").read_text())
    assert training["log"][-1]["step"] == 8 and training["cpu_seconds"] > 0 and training["seconds"] > 0
    assert main(["sae", "evaluate", str(tmp_path / "sae"), "--output", str(tmp_path / "found.json"), *of_text]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["l0"] > 0 and len(found["density"]) == 64 and "kl_recovered" in found
    assert (
        main(["sae", "contexts", str(tmp_path / "sae"), "--latents", "3", "--top", "2", "--pieces", "9", *of_text]) == 0
    )
    assert "latent 3, active at" in capsys.readouterr().out
    assert main(["sae", "export", str(tmp_path / "sae"), str(tmp_path / "lens")]) == 0
    assert main(["sae", "import", str(tmp_path / "lens"), str(tmp_path / "back")]) == 0
    x = torch.randn(5, 32)
    torch.testing.assert_close(
        SparseAutoencoder.from_pretrained(tmp_path / "back").eval().encode(x),
        sae.eval().encode(x),
        rtol=1e-4,
        atol=1e-4,
    )
    capsys.readouterr()
    (tmp_path / "copy.txt").write_text(text.read_text())
    monkeypatch.chdir(tmp_path)
    for seen in (str(text), "text.txt", "copy.txt"):  # the same text by any name
        assert main(["sae", "evaluate", str(tmp_path / "sae"), "--text", str(other), seen, *sizes]) == 2
        assert "the autoencoder was trained on it" in capsys.readouterr().err
    assert main(["sae", "evaluate", str(tmp_path / "sae"), "--text", str(other), "--piece", "6000"]) == 2
    assert "shorter than one piece of 6000 tokens" in capsys.readouterr().err
    assert main(["sae", "evaluate", str(tmp_path / "sae"), "--text", "no-such-book"]) == 2
    assert "no-such-book" in capsys.readouterr().err
    assert main(["sae", "evaluate", str(tmp_path / "sae"), "--pieces", "0", *of_text]) == 2
    assert "--pieces 0" in capsys.readouterr().err
    assert set(asked_for) == {"tiny"}
    for action in ("evaluate", "contexts"):
        assert main(["sae", action, str(tmp_path / "sae"), "--model", "another", *of_text]) == 2
        assert "--model another was given, but the autoencoder was trained on tiny" in capsys.readouterr().err
    sae.config.model_name = None
    sae.save_pretrained(tmp_path / "nameless")
    assert main(["sae", "contexts", str(tmp_path / "nameless"), *of_text]) == 2
    assert "give --model" in capsys.readouterr().err
    given = ["--model", "another", "--pieces", "2", "--count", "1", *of_text]
    assert main(["sae", "contexts", str(tmp_path / "nameless"), *given]) == 0 and asked_for[-1] == "another"


def test_the_command_trains_on_what_a_built_in_memory_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = BuiltIn("senri", "built_in", "default").model()
    monkeypatch.setattr("senri_hf.commands.sae.load", lambda arguments: (model, Letters()))
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 20)
    (tmp_path / "other.txt").write_text("Call me Ishmael. Some years ago, never mind how long precisely. " * 9)
    sizes = ["--piece", "32", "--rows", "4"]
    of_text = ["--text", str(tmp_path / "other.txt"), *sizes]
    train = ["sae", "train", "--module", "model.layers.0.memory", "--output", str(tmp_path / "sae"), "--steps", "3"]
    assert main([*train, "--k", "4", "--batch-size", "64", "--buffer-size", "400", "--text", str(text), *sizes]) == 0
    assert main(["sae", "evaluate", str(tmp_path / "sae"), "--output", str(tmp_path / "found.json"), *of_text]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["l0"] > 0 and found["kl_zero"] > 0


def test_a_folder_in_use_is_resumed_with_the_same_settings_or_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("senri_hf.commands.sae.load", lambda arguments: (tiny_model("llama"), Letters()))
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("It was the best of times, it was the worst of times. " * 20)
    train = ["sae", "train", "--module", "model.layers.1", "--k", "4", "--batch-size", "64", "--buffer-size", "400",
             "--piece", "16", "--save-every", "2", "--text", "text.txt", "--output", "sae"]  # fmt: skip
    assert main([*train, "--steps", "2"]) == 0
    held = {path: path.read_bytes() for path in Path("sae").rglob("*") if path.is_file()}
    Path("text.txt").rename("moved.txt")
    Path("text.txt").write_text("Call me Ishmael. Some years ago, never mind how long precisely. " * 20)
    refusals = {
        "in use: go on with --resume": [],
        "k=4, not 5": ["--resume", "--text", "moved.txt", "--k", "5"],
        "variant='batchtopk', not 'topk'": ["--resume", "--variant", "topk"],
        "text={": ["--resume"],  # another text by the same name
    }
    for message, changes in refusals.items():
        assert main([*train, *changes]) == 2
        assert message in capsys.readouterr().err
    Path("elsewhere").mkdir()
    Path("elsewhere/notes.txt").touch()
    assert main([*train, "--resume", "--output", "elsewhere"]) == 2
    assert "elsewhere has no settings.json" in capsys.readouterr().err
    assert held == {path: path.read_bytes() for path in Path("sae").rglob("*") if path.is_file()}
    Path("moved.txt").rename("text.txt")
    assert main([*train, "--steps", "4", "--resume"]) == 0
    assert json.loads(Path("sae/settings.json").read_text())["steps"] == 4


def test_what_is_measured_on_by_default_is_not_trained_on() -> None:
    parsed = {action: vars(build_parser().parse_args(["sae", action, *more])) for action, more in
              {"train": ["--module", "m", "--output", "o"], "evaluate": ["o"], "contexts": ["o"]}.items()}  # fmt: skip
    assert not set(parsed["train"]["text"]) & {*parsed["evaluate"]["text"], *parsed["contexts"]["text"]}
