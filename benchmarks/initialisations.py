"""Trains adapters on names from each of their two initialisations, and compares what they learn in as many steps.

    python benchmarks/initialisations.py
    python benchmarks/initialisations.py --mechanisms compressive

Reads that start as the layer's own attention, beside random projections with an output of zero, of an episodic and of a
compressive memory.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tqdm import tqdm

from senri_hf.files import write_json


ROOT = Path(__file__).parents[1]
TRAIN = ROOT / "examples" / "name_recall" / "train.py"
INITIALISATIONS = ("base_attention", "zero")
MECHANISMS = {"episodic": ["--rank", "0"], "compressive": ["--mechanism", "compressive"]}
STEPS, BATCH = 60, 8
SETTING = [
    "--task",
    "names",
    "--memory-layers",
    "11,14,17,20,23,26",
    "--lr",
    "5e-4",
    "--warmup-steps",
    "10",
]
SETTING += ["--keep-every", "0", "--prose-every", "0", "--batch-size", str(BATCH), "--grad-accum", "1"]
SETTING += ["--num-train", str(STEPS * BATCH), "--num-val", "64", "--epochs", "1", "--eval-every", "20"]


def trained(mechanism: str, init: str, model: str, seed: int) -> dict[str, float]:
    """Share of unseen names of which every token came out on top, by optimizer steps."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(TRAIN), "--model", model, "--init", init, *MECHANISMS[mechanism], *SETTING]
        subprocess.run([*command, "--seed", str(seed), "--checkpoint-dir", folder], check=True)
        history = json.loads((Path(folder) / "training_history.json").read_text(encoding="utf-8"))
    return {str(entry["step"]): entry["eval_exact"] for entry in history if "eval_exact" in entry}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mechanisms", nargs="+", choices=MECHANISMS, default=list(MECHANISMS))
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "initialisations.json")
    args = parser.parse_args()
    stored: dict[str, Any] = json.loads(args.output.read_text()) if args.output.exists() else {}
    settings = {"setting": " ".join(SETTING), "seed": args.seed}
    found = stored.setdefault(args.model, {**settings, "exact": {}})
    if any(found[name] != value for name, value in settings.items()):
        raise SystemExit(f"{args.output} has runs of {args.model} with other settings; give another --output")
    pairs = [(mechanism, init) for mechanism in args.mechanisms for init in INITIALISATIONS]
    for mechanism, init in tqdm(pairs, desc="initialisations"):
        found["exact"][f"{mechanism}, {init}"] = trained(mechanism, init, args.model, args.seed)
        write_json(args.output, stored)
    print(json.dumps(found["exact"], indent=1))


if __name__ == "__main__":
    main()
