"""The examples of name recall: they run from their command line, and leave what they say."""

import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from chatting import chat_model, word_tokenizer
from models import MEMORY_LAYERS
from peft import PeftModel
from safetensors.torch import load_file

from senri_hf import load_base
from senri_hf.memory.owner import owners


Run = Callable[..., None]
LAYERS = ",".join(map(str, MEMORY_LAYERS))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny chat model; its adapter stands beside it."""
    root = tmp_path_factory.mktemp("name_recall")
    tokenizer = word_tokenizer()
    model = chat_model(tokenizer)
    model.save_pretrained(root / "adapter")
    tokenizer.save_pretrained(root / "base")
    model.unload().save_pretrained(root / "base")
    return root / "base"


@pytest.fixture
def run(load: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Runs a script's `main` with the given arguments; its loggers write to its own files only."""
    loggers = [logging.getLogger(name) for name in ("experiment", "name_recall")]

    def close() -> None:
        for logger in loggers:
            for handler in list(logger.handlers):
                logger.removeHandler(handler)
                handler.close()

    def main(script: str, *arguments: object) -> None:
        monkeypatch.setattr("sys.argv", [script, *map(str, arguments)])
        load(f"name_recall/{script}").main()
        close()

    yield main
    close()


def results(folder: Path) -> list[dict[str, Any]]:
    """The phases of the only results in a folder."""
    (path,) = folder.glob("*results_*.json")
    return json.loads(path.read_text())["phases"]


def test_names_are_kept_decay_and_are_corrected(run: Run, tmp_path: Path) -> None:
    run("experiment.py", "--output-dir", tmp_path / "first", "--save-memory", tmp_path / "memory", "--decay-cycles", 3)
    phases = results(tmp_path / "first")
    assert [phase["phase"] for phase in phases[-3:]] == ["after 3 decay cycles", "correction", "after 3 decay cycles"]
    before, decayed = (phase["names"]["Alice"] for phase in phases[4:6])
    assert before["stored"] and decayed["strength"] == pytest.approx(before["strength"] * 0.95**3)
    assert [phase["names"]["Sarah"]["stored"] for phase in phases] == [False] * 6 + [True] * 2


def test_an_experiment_goes_on_with_a_saved_memory(run: Run, tmp_path: Path) -> None:
    run("experiment.py", "--output-dir", tmp_path / "first", "--auto-save")
    run("experiment.py", "--output-dir", tmp_path / "second", "--load-memory", tmp_path / "first" / "memory")
    first, second = results(tmp_path / "first"), results(tmp_path / "second")
    assert second[0]["names"]["Sarah"]["strength"] == pytest.approx(first[-1]["names"]["Sarah"]["strength"] * 0.95)
    assert not (tmp_path / "second" / "memory").exists()


def test_a_model_is_told_asked_and_corrected(run: Run, base: Path, tmp_path: Path) -> None:
    model = ["--model", base, "--checkpoint", base.parent / "adapter"]
    run("experiment_llm.py", *model, "--output-dir", tmp_path / "whole", "--decay-cycles", 2)
    phases = {phase["phase"]: phase for phase in results(tmp_path / "whole")}
    assert len(phases) == 7 and phases["recall after correction"]["expected"] == "Sarah"
    assert [name for name, phase in phases.items() if phase["tokens_written"]] == ["introduction", "correction"]
    run("experiment_llm.py", *model, "--output-dir", tmp_path / "simple", "--simple")
    assert [phase["phase"] for phase in results(tmp_path / "simple")] == ["before", "introduction", "recall"]


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_a_chat_that_ends_at_once_is_written(
    run: Run, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: type[BaseException]
) -> None:
    said = iter(["hello", "", "my name is Alice"])

    def say(prompt: str) -> str:
        for text in said:
            return text
        raise end

    monkeypatch.setattr("builtins.input", say)
    run("experiment_llm.py", "--model", base, "--checkpoint", base.parent / "adapter", "-i", "--output-dir", tmp_path)
    assert [phase["said"] for phase in results(tmp_path)] == ["hello", "my name is Alice"]


def test_modes_exclude_each_other(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("experiment_llm.py", "-i", "-s")
    assert "not allowed with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "warning"),
    [
        (["--checkpoint", "adapter", "--memory-layers", LAYERS], None),
        (["--checkpoint", "adapter", "--memory-layers", "1"], f"has its memory in the layers {LAYERS}: those are used"),
        (["--memory-layers", "1"], "an adapter that is not trained"),
    ],
)
def test_layers_of_a_checkpoint_are_its_own(
    load: Any, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    options: list[str], warning: str | None,
) -> None:  # fmt: skip
    monkeypatch.chdir(base.parent)
    monkeypatch.setattr("sys.argv", ["experiment_llm.py", "--model", str(base), *options])
    script = load("name_recall/experiment_llm.py")
    chat = script.load(script.parse())
    assert [owner.layer_idx for owner in owners(chat.model)] == (MEMORY_LAYERS if "--checkpoint" in options else [1])
    said = capsys.readouterr().err
    assert "Warning" not in said if warning is None else warning in said


def train(run: Run, base: Path, folder: Path, *options: object) -> None:
    run(
        "train.py", "--model", base, "--checkpoint-dir", folder, "--memory-layers", LAYERS, "--dtype", "float32",
        "--num-train", 4, "--num-val", 2, "--max-steps", 2, "--grad-accum", 1, "--eval-every", 2, "--save-every", 1,
        "--prose-every", 0, "--rank", 2, "--task", "names", "--buffer-slots", 64, "--store-slots", 16, *options,
    )  # fmt: skip


def test_training_leaves_an_adapter_and_its_history(run: Run, base: Path, tmp_path: Path) -> None:
    train(run, base, tmp_path)
    history = json.loads((tmp_path / "training_history.json").read_text())
    assert any("eval_exact" in entry for entry in history) and (tmp_path / "training.png").stat().st_size
    for name in ("best", "final"):
        model, _ = load_base(str(base), progress=False)
        assert PeftModel.from_pretrained(model, tmp_path / name).peft_config["default"].rank == 2


def test_training_goes_on_from_the_checkpoint_that_is_named(run: Run, base: Path, tmp_path: Path) -> None:
    train(run, base, tmp_path)
    (tmp_path / "training_history.json").unlink()
    train(run, base, tmp_path, "--resume", tmp_path / "checkpoint-1", "--resume-if-begun")
    history = json.loads((tmp_path / "training_history.json").read_text())
    # From the last checkpoint, the second, no step would be left to take.
    assert any("eval_exact" in entry for entry in history) and history[-1]["train_loss"] > 0


def test_training_goes_on_with_the_settings_that_it_began_with(run: Run, base: Path, tmp_path: Path) -> None:
    train(run, base, tmp_path)
    with pytest.raises(SystemExit, match=r"was begun with --lr 0\.0001, not 0\.5, --rank 2, not 4"):
        train(run, base, tmp_path, "--resume-if-begun", "--lr", "0.5", "--rank", "4")
    train(run, base, tmp_path, "--resume-if-begun", "--save-every", "2")


def test_a_setting_that_came_later_was_as_it_is_by_default(run: Run, base: Path, tmp_path: Path) -> None:
    train(run, base, tmp_path)
    settings = json.loads((tmp_path / "arguments.json").read_text())
    (tmp_path / "arguments.json").write_text(
        json.dumps({name: value for name, value in settings.items() if name not in ("mechanism", "detach_every")})
    )
    with pytest.raises(SystemExit, match="--mechanism episodic, not compressive"):
        train(run, base, tmp_path, "--resume-if-begun", "--mechanism", "compressive", "--detach-every", "2")
    train(run, base, tmp_path, "--resume-if-begun")


def test_compressive_memory_learns_what_to_write_from_later_answers(run: Run, base: Path, tmp_path: Path) -> None:
    """Keys and values of told conversations move, though no answer is in them."""
    options = [
        "--mechanism",
        "compressive",
        "--lr",
        "1e-2",
        "--warmup-steps",
        "1",
        "--max-steps",
        "4",
    ]
    train(run, base, tmp_path, *options)
    weights = [load_file(tmp_path / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (3, 4)]
    for part in ("k_proj", "v_proj", "b_proj", "conv1d", "q_proj", "o_proj"):
        names = [name for name in weights[0] if part in name]
        assert names and not any(torch.equal(weights[0][name], weights[1][name]) for name in names)
    model, _ = load_base(str(base), progress=False)
    assert PeftModel.from_pretrained(model, tmp_path / "final").peft_config["default"].mechanism == "compressive"
    with pytest.raises(SystemExit, match="--detach-every 1"):
        train(run, base, tmp_path / "other", "--mechanism", "compressive", "--detach-every", "1")


def test_training_begins_with_what_fits(
    run: Run, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = tmp_path / "first" / "final"
    train(run, base, tmp_path / "first")
    capsys.readouterr()
    train(run, base, tmp_path / "same", "--from-adapter", adapter)
    assert "--from-adapter" not in capsys.readouterr().out
    train(run, base, tmp_path / "more", "--from-adapter", adapter, "--memory-layers", "0,1")
    out = capsys.readouterr().out
    assert "nothing that fits" in out and "layers.1." in out and "layers.0." not in out
    with pytest.raises(SystemExit, match="none of its"):
        train(run, base, tmp_path / "other", "--from-adapter", adapter, "--memory-layers", "1")


def test_the_adapter_at_the_end_has_the_mean_of_what_training_passed_through(
    run: Run, base: Path, tmp_path: Path
) -> None:
    rates = ["--lr", "1e-2", "--min-lr-ratio", "1"]
    for name, more in {"last": [], "mean": ["--average-from", "0"]}.items():
        train(run, base, tmp_path / name, *rates, *more)
    passed = [load_file(tmp_path / "last" / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (1, 2)]
    final = load_file(tmp_path / "mean" / "final" / "adapter_model.safetensors")
    assert any(not torch.equal(passed[0][name], passed[1][name]) for name in final)
    for name, weight in final.items():
        mean = sum(weights[name].float() for weights in passed) / 2
        torch.testing.assert_close(weight.float(), mean, rtol=1e-2, atol=1e-3)


def test_an_average_goes_on_where_training_does(run: Run, base: Path, tmp_path: Path) -> None:
    options = ["--lr", "1e-2", "--average-from", "0"]
    train(run, base, tmp_path, *options)
    whole = load_file(tmp_path / "final" / "adapter_model.safetensors")
    for folder in ("checkpoint-2", "final"):
        shutil.rmtree(tmp_path / folder)
    train(run, base, tmp_path, *options, "--resume-if-begun")
    resumed = load_file(tmp_path / "final" / "adapter_model.safetensors")
    assert all(torch.equal(weight, resumed[name]) for name, weight in whole.items())
    shutil.rmtree(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-1" / "average.safetensors").unlink()
    with pytest.raises(ValueError, match="is missing: training goes on from step 1"):
        train(run, base, tmp_path, *options, "--resume-if-begun")


@pytest.mark.parametrize("share", ["-0.1", "1"])
def test_an_average_from_nowhere_is_refused(run: Run, base: Path, tmp_path: Path, share: str) -> None:
    with pytest.raises(SystemExit, match="--average-from"):
        train(run, base, tmp_path, "--average-from", share)


def test_training_asks_for_matplotlib_before_it_begins(
    run: Run, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=r"pip install 'senri_hf\[plots\]'"):
        train(run, base, tmp_path / "checkpoints")
    assert not (tmp_path / "checkpoints").exists()
