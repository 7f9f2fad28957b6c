"""Two processes train as one does: the loss of every step of DDP and FSDP2 runs beside that of a single process.

    python examples/distributed/same_trajectory.py            # on CPUs, with gloo; a minute or two

Each run sees the same rows in the same order, and the routers' losses, which are of each process's own tokens, are off.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path


CONFIG = Path(__file__).parent.parent / "configs" / "base_small_cpu.yaml"
ROWS = 4
SMALL = [
    "hidden_dim=32", "num_heads=2", "num_layers=2", "intermediate_dim=64", "vocab_size=300", "max_length=32",
    "dataset_subset=dubliners", "use_load_balance_loss=false", "eval_split=null", "save_best_model=false",
    "warmup_steps=1", "logging_steps=1",
]  # fmt: skip
RUNS = {
    "one process": (1, []),
    "two processes, DDP": (2, ["distributed_strategy=ddp"]),
    "two processes, FSDP2": (2, ["distributed_strategy=fsdp"]),
}


def losses(name: str, steps: int, folder: Path) -> list[float]:
    """The loss of every step of a run of its own."""
    processes, settings = RUNS[name]
    out = folder / name.replace(" ", "_")
    train = [
        "-m", "senri_hf.commands.main", "train", "--config", str(CONFIG), *SMALL, *settings, f"max_steps={steps}",
        f"save_steps={steps}", f"batch_size={ROWS // processes}", f"num_gpus={processes}", f"output_dir={out}",
    ]  # fmt: skip
    launch = [sys.executable, *train]
    if processes > 1:
        launch = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={processes}",
            *train,
        ]
    done = subprocess.run(launch, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-3000:]}")
    history = json.loads((out / "training_history.json").read_text())
    return [entry["loss"] for entry in history if "loss" in entry]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = {
            name: losses(name, arguments.steps, Path(folder))
            for name in dict.fromkeys(["one process", *arguments.runs])
        }
    alone = found["one process"]
    worst = 0.0
    for name, values in found.items():
        apart = max(abs(ours - theirs) for ours, theirs in zip(values, alone, strict=True))
        worst = max(worst, apart)
        print(f"{name:22} {' '.join(f'{value:.4f}' for value in values)}   at most {apart:.1e} apart")
    return int(worst > 1e-3)


if __name__ == "__main__":
    sys.exit(main())
