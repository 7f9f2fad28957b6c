"""However a run is launched, and also when it is killed, it trains the same model.

    python examples/distributed/same_trajectory.py            # on CPUs, with gloo; writes docs/bank_distributed.json

A run of one process is the measure. Runs of two processes, DDP and FSDP2, see the same rows in the same order; each is
run whole, and once more with a SIGKILL to all of its processes after a checkpoint and then resumed. What is compared is
the loss of every step, and the loss on held-out text of the final model, loaded in a single process. What each run
itself said it had wrapped its model in is written with it. All losses of routers are on: they are of the tokens of all
processes.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from senri_hf.commands.evaluate import perplexity
from senri_hf.files import write_json
from senri_hf.training import run as runs


ROOT = Path(__file__).parent.parent.parent
CONFIG = ROOT / "examples" / "configs" / "base_small_cpu.yaml"
ROWS, STEPS, EVALUATED = 4, 16, 64
SMALL = [
    "hidden_dim=32", "num_heads=2", "num_layers=2", "intermediate_dim=64", "vocab_size=300", "max_length=32",
    "dataset_subset=dubliners", "eval_split=null", "save_best_model=false",
    "use_load_balance_loss=true", "use_auxiliary_loss=true", "use_z_loss=true",
    "warmup_steps=1", "logging_steps=1", f"max_steps={STEPS}", "save_steps=2",
]  # fmt: skip
LAUNCHED = [
    "-m",
    "accelerate.commands.launch",
    "--num_processes",
    "2",
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
]
# Of each run: what launches it, its processes, and its settings.
RUNS: dict[str, tuple[list[str], int, list[str]]] = {
    "one process": ([], 1, []),
    "two processes, DDP": ([*LAUNCHED, "--multi_gpu"], 2, ["distributed_strategy=ddp"]),
    "two processes, FSDP2": ([*LAUNCHED, "--multi_gpu"], 2, ["distributed_strategy=fsdp"]),
    "two processes, FSDP2 by the launcher's flag": ([*LAUNCHED, "--use_fsdp"], 2, []),
}
PATIENCE = 600.0


def start(name: str, out: Path, resumed: bool = False) -> subprocess.Popen[str]:
    """A run in processes of its own."""
    launcher, processes, settings = RUNS[name]
    command = [
        sys.executable, *launcher, "-m", "senri_hf.commands.main", "train", "--config", str(CONFIG), *SMALL, *settings,
        f"batch_size={ROWS // processes}", f"num_gpus={processes}", f"output_dir={out}",
        *(["--resume", str(out)] if resumed else []),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(name: str, run: subprocess.Popen[str]) -> dict[str, Any]:
    """Wait for a run; what its model was wrapped in, by its own words. What it said of an error is raised."""
    said, error = run.communicate(timeout=PATIENCE)
    if run.returncode:
        raise RuntimeError(f"{name} failed:\n{error[-3000:]}")
    wrapped = re.search(r"(\d+) process\(es\) trained a (\w+), (\d+) of (\d+) parameters sharded", said)
    if wrapped is None or int(wrapped[1]) != RUNS[name][1] or (wrapped[3] == wrapped[4]) != ("FSDP" in name):
        raise RuntimeError(f"{name} was not wrapped as its name says:\n{said[-3000:]}")
    return {"model": wrapped[2], "sharded": int(wrapped[3]), "parameters": int(wrapped[4])}


def kill_after_checkpoint(name: str, run: subprocess.Popen[str], out: Path) -> int:
    """Kill all processes of a run as soon as a checkpoint is whole; the step from which it can go on."""
    end = time.monotonic() + PATIENCE
    while not any(runs.is_whole(place) for place in out.glob("checkpoint-*")):
        if run.poll() is not None or time.monotonic() > end:
            break
        time.sleep(0.002)
    if run.poll() is None:
        launcher = psutil.Process(run.pid)
        for process in [launcher, *launcher.children(recursive=True)]:  # workers have sessions of their own
            process.kill()
        run.communicate()
    if run.returncode != -signal.SIGKILL or (out / runs.FINAL).exists():
        finish(name, run)
        raise RuntimeError(f"{name} was to be killed, but had ended")
    return int(runs.checkpoint_to_resume(out).name.rpartition("-")[2])


def losses(out: Path) -> list[float]:
    history = json.loads((out / "training_history.json").read_text())
    return [entry["loss"] for entry in history if "loss" in entry]


def held_out(out: Path) -> float:
    """The loss of a final model, loaded in this process."""
    run = runs.load_checkpoint(out / runs.FINAL)
    rows = runs.encoded(run, "test")[:EVALUATED]
    return perplexity(run.model, rows, runs.collator(run), ROWS)["loss"]


def measured(name: str, folder: Path) -> list[dict[str, Any]]:
    """A run, whole and killed."""
    found = []
    for killed in (False, True):
        out = folder / f"{re.sub('[^a-zA-Z0-9]+', '_', name)}_{killed}"
        run, step = start(name, out), None
        if killed:
            step = kill_after_checkpoint(name, run, out)
            run = start(name, out, resumed=True)
        wrapped = finish(name, run)
        found.append(
            {"run": name, "resumed_at": step, "wrapped": wrapped, "losses": losses(out), "held_out": held_out(out)}
        )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "bank_distributed.json")
    arguments = parser.parse_args()
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in dict.fromkeys(["one process", *arguments.runs]):
            for one in measured(name, Path(folder)):
                measure = found[0] if found else one
                pairs = zip(one["losses"], measure["losses"], strict=True)
                one["apart"] = max(abs(ours - theirs) for ours, theirs in pairs)
                one["held_out_apart"] = abs(one["held_out"] - measure["held_out"])
                found.append(one)
                what = name if one["resumed_at"] is None else f"{name}, killed and resumed at {one['resumed_at']}"
                print(
                    f"{what}: {one['losses'][-1]:.4f} at the end; at most {one['apart']:.1e} apart in training, "
                    f"{one['held_out_apart']:.1e} on held-out text",
                    flush=True,
                )
    write_json(arguments.out, {"steps": STEPS, "settings": SMALL, "runs": found})
    return int(max(max(one["apart"], one["held_out_apart"]) for one in found) > 1e-3)


if __name__ == "__main__":
    sys.exit(main())
