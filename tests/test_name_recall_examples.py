"""The examples of name recall: they run from their command line, and leave what they say."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chatting import chat_model, word_tokenizer
from models import MEMORY_LAYERS
from peft import PeftModel

from senri_hf import load_base


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
