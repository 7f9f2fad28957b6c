"""Two processes train the model that one trains, whole on each (DDP) or in shards (FSDP2), here on CPUs with gloo."""

import json
import os
import re
import socket
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import pytest
import test_runs
import torch
import yaml
from torch.multiprocessing.spawn import spawn

from senri_hf.commands.main import main
from senri_hf.training import run as runs


place = test_runs.place
TRAINED_BASE = ["freeze_base_model=false", "base_model_lr=0.01", "memory_lr=0.05", "memory_sharing=per_layer"]
# DDP first: Accelerate leaves word in the environment that FSDP is on.
RUNS: dict[str, tuple[str, list[str]]] = {
    "ddp base": ("base", [*TRAINED_BASE, "gradient_accumulation_steps=2", "gradient_checkpointing=true"]),
    "fsdp by the launcher": (
        "new",
        ["memory_lr=0.01", "base_model_lr=0.01", "save_precision=bf16", "gradient_checkpointing=true"],
    ),
    "fsdp base": ("base", TRAINED_BASE),
    "fsdp both": ("base", ["use_both_memory_and_lora=true", "memory_sharing=per_layer", "lora_lr=0.05"]),
}


def settings(name: str, place: Path, out: Path) -> list[str]:
    home, changes = RUNS[name]
    routers = [
        "use_load_balance_loss=true",
        "use_auxiliary_loss=true",
        "auxiliary_loss_coefficient=0.5",
        "use_z_loss=true",
    ]
    return [*test_runs.settings_of(place, home, out), *changes, *routers, "lora_dropout=0.0"]


def train(*overrides: str, config: str | Path = os.devnull) -> int:
    return main(["train", "--config", str(config), *overrides])


def work(rank: int, port: int, place: Path, folder: Path) -> None:
    """One of two processes: every run, those in shards again from a checkpoint, and one that cannot be sharded."""
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2"
    )
    for name in RUNS:
        out = folder / name
        with StringIO() as said, redirect_stdout(said):
            if name == "fsdp by the launcher":
                os.environ["ACCELERATE_USE_FSDP"] = "true"  # as accelerate launch --use_fsdp does
            asked = ["distributed_strategy=fsdp"] if name in ("fsdp base", "fsdp both") else []
            assert train(*settings(name, place, out), "batch_size=1", *asked) == 0
            if rank == 0:
                (folder / f"{name}.txt").write_text(said.getvalue())
        if name.startswith("fsdp"):
            again = [f"output_dir={folder}/{name}, again", f"resume_from_checkpoint={out}/checkpoint-2"]
            assert train(*again, config=out / runs.EFFECTIVE) == 0
    with patch.dict(os.environ, FSDP_ACTIVATION_CHECKPOINTING="true"), StringIO() as said:
        with redirect_stderr(said):
            assert train(*settings("fsdp base", place, folder / "refused"), "distributed_strategy=fsdp") == 2
        assert "use gradient_checkpointing=true instead" in said.getvalue()
    os.environ["ACCELERATE_USE_CPU"] = "true"  # as accelerate launch --cpu does, on a machine with GPUs
    with patch.object(torch.accelerator, "is_available", return_value=True), StringIO() as said:
        with redirect_stderr(said):
            assert train(*settings("fsdp by the launcher", place, folder / "refused")) == 2
        assert "FSDP was asked for, but processes of the kind MULTI_CPU" in said.getvalue()


@pytest.fixture(scope="module")
def shared(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs of two processes."""
    folder = tmp_path_factory.mktemp("shared")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(work, (port, place, folder), nprocs=2)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_what_one_trains(name: str, place: Path, shared: Path, tmp_path: Path) -> None:
    """Loss for loss, to the same weights, which load anywhere; and on from a checkpoint."""
    alone, out = tmp_path / "alone", shared / name
    assert train(*settings(name, place, alone)) == 0
    losses = test_runs.losses(alone)
    assert test_runs.losses(out) == pytest.approx(losses, rel=1e-5)
    if name.startswith("fsdp"):
        assert test_runs.losses(shared / f"{name}, again")[-2:] == pytest.approx(losses[-2:], rel=1e-5)
    final, expected = (dict(runs.load_checkpoint(at / runs.FINAL).model.named_parameters()) for at in (out, alone))
    assert final.keys() == expected.keys()
    rounding = 2**-7 if "save_precision=bf16" in RUNS[name][1] else 0.0  # saved values may round to neighbours
    for parameter, value in final.items():
        torch.testing.assert_close(
            value, expected[parameter], atol=1e-4, rtol=rounding, msg=lambda m, p=parameter: f"{p}: {m}"
        )
    files = [{path.name for path in (folder / runs.FINAL).rglob("*")} for folder in (alone, out)]
    assert files[0] == files[1] and ("base_parameters.safetensors" in files[1]) == (TRAINED_BASE[0] in RUNS[name][1])


@pytest.mark.parametrize("name", RUNS)
def test_what_is_in_force_is_written(name: str, shared: Path) -> None:
    """The number of processes and how they share the model, also where the launcher alone says it."""
    said = re.search(r"2 process\(es\) trained an? (\w+), (\d+) of (\d+) par", (shared / f"{name}.txt").read_text())
    assert said is not None
    is_sharded = name.startswith("fsdp")
    assert said[1].startswith("FSDP" if is_sharded else "DistributedDataParallel")
    assert int(said[2]) == (int(said[3]) if is_sharded else 0) and int(said[3]) > 0
    written = yaml.safe_load((shared / name / runs.EFFECTIVE).read_text())["training"]
    assert (written["num_gpus"], written["distributed_strategy"]) == (2, name.partition(" ")[0])


def test_the_page_says_what_was_wrapped_in_what_and_under_which_condition(load: Callable[[str], ModuleType]) -> None:
    page, docs = load("bank_results.py"), Path(__file__).parent.parent / "docs"
    with patch.object(page, "save"):  # of pictures
        assert page.page() == (docs / "bank_results.md").read_text()
    found = json.loads((docs / "bank_distributed.json").read_text())
    for run in found["runs"]:
        wrapped = run["wrapped"]
        assert (wrapped["sharded"] == wrapped["parameters"]) == ("FSDP" in run["run"])
        assert wrapped["model"].startswith("FSDP") == ("FSDP" in run["run"])
        assert max(run["apart"], run["held_out_apart"]) < 1e-4
    assert {"use_load_balance_loss=true", "use_z_loss=true"} <= set(found["settings"])
