"""Does a memory bank help? Memory beside dense models, and beside LoRA, on books, at tuned learning rates.

    python examples/memory_comparison/compare.py scratch     # small models from scratch: dense, wider dense, memory
    python examples/memory_comparison/compare.py adapter     # none, memory, LoRA and both in a model that exists

Every variant tries the same learning rates with the first seed and runs its best one with the others. Finished runs are
kept in --out, so that an interrupted comparison goes on where it was. The last tenth of each book is held out.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from senri_hf.commands.evaluate import perplexity
from senri_hf.configuration.run import RunConfig
from senri_hf.training import run as runs


HERE = Path(__file__).parent
CONFIGS = HERE.parent / "configs"
OUT = HERE.parent.parent / "docs" / "memory_comparison.json"
HIDDEN, LAYERS, MEMORY_LAYERS, INNER, LENGTH, BATCH = 64, 4, 2, 172, 64, 8
SIZES = {
    "scratch": [f"hidden_dim={HIDDEN}", f"intermediate_dim={INNER}", f"max_length={LENGTH}", f"batch_size={BATCH}"],
    "adapter": ["max_length=64", "batch_size=2"],
}
# Held-out rows that are read; all of them where a model is small.
EVALUATED = {"scratch": None, "adapter": 48}


def wider(parameters: float) -> list[str]:
    """Settings of a dense model with so many more parameters: multiplications of a token are as many."""
    inner = INNER + round(parameters / (3 * HIDDEN * LAYERS))
    return ["vanilla_mode=true", f"intermediate_dim={inner}"]


def memory_parameters(rows: int) -> int:
    return rows * HIDDEN + MEMORY_LAYERS * 4 * HIDDEN**2


def memory_multiplications(rows: int) -> float:
    """Of a token: queries and outputs, its share of the rows' keys and values, scores and sums."""
    return MEMORY_LAYERS * (2 * HIDDEN**2 + rows * 2 * HIDDEN**2 / (LENGTH * BATCH) + 2 * rows * HIDDEN)


WHOLE = ["use_chapters=false"]
SCRATCH: dict[str, list[str]] = {
    "dense": ["vanilla_mode=true"],
    "dense, parameters of memory 256": wider(memory_parameters(256)),
    "dense, multiplications of memory 256": wider(memory_multiplications(256)),
    "memory 64": ["num_memory_tokens=64", *WHOLE],
    "memory 256": ["num_memory_tokens=256", *WHOLE],
    "memory 1024": ["num_memory_tokens=1024", *WHOLE],
    "memory 256, 4 of 16 chapters": ["num_memory_tokens=256"],
}
ADAPTER: dict[str, list[str]] = {
    "memory": [],
    "LoRA": ["use_lora=true", "use_memory_adapter=false"],
    "memory and LoRA": ["use_both_memory_and_lora=true"],
}
PARTS: dict[str, tuple[str, dict[str, list[str]], tuple[float, ...]]] = {
    "scratch": ("base_small_cpu.yaml", SCRATCH, (3e-3, 8e-3)),
    "adapter": ("adapter_smollm2_cpu.yaml", ADAPTER, (5e-4, 2e-3)),
}
RATES = ("memory_lr", "lora_lr", "base_model_lr")


def configured(part: str, settings: list[str], folder: str, steps: int, rate: float, seed: int) -> RunConfig:
    """A run that is evaluated at its end only."""
    rates = [f"{name}={rate}" for name in RATES]
    once = [f"max_steps={steps}", f"warmup_steps={steps // 10}", "eval_split=null", "save_best_model=false"]
    return RunConfig.load(
        CONFIGS / PARTS[part][0],
        [*SIZES[part], *settings, *rates, *once, f"save_steps={steps}", f"seed={seed}", f"output_dir={folder}"],
    )


def one_run(part: str, settings: list[str], steps: int, rate: float, seed: int) -> dict[str, Any]:
    """Train, and the loss on what was held out."""
    with tempfile.TemporaryDirectory() as folder:
        config = configured(part, settings, folder, steps, rate, seed)
        run = runs.prepare(config)
        trainer = runs.trainer_of(run)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        return {
            "rate": rate,
            "seed": seed,
            **held_out(run, part),
            "seconds": round(seconds),
            "trained_parameters": sum(p.numel() for p in run.model.parameters() if p.requires_grad),
            "training_tokens": trained_tokens(config, steps),
        }


def trained_tokens(config: RunConfig, steps: int) -> int:
    section = config.training
    return steps * section.batch_size * section.gradient_accumulation_steps * section.max_length


def held_out(run: runs.Run, part: str) -> dict[str, float]:
    """Loss and perplexity on the test split."""
    rows = runs.encoded(run, "test")[: EVALUATED[part]]
    return perplexity(run.model, rows, runs.collator(run), run.config.training.batch_size)


def untrained(part: str) -> dict[str, Any]:
    """The base model as it is."""
    with tempfile.TemporaryDirectory() as folder:
        run = runs.prepare(configured(part, ["vanilla_mode=true"], folder, 10, 1e-3, 0))
        return {
            "rate": 0,
            "seed": 0,
            **held_out(run, part),
            "seconds": 0,
            "trained_parameters": 0,
            "training_tokens": 0,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--steps", type=int, help="of a run: 120 from scratch, 16 in a model that exists")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--variants", nargs="+", help="only those")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    steps = arguments.steps or {"scratch": 120, "adapter": 16}[arguments.part]
    _, variants, rates = PARTS[arguments.part]
    results: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}

    def run(variant: str, rate: float, seed: int) -> float:
        done = results.setdefault(arguments.part, {}).setdefault(variant, [])
        found = next((one for one in done if (one["rate"], one["seed"]) == (rate, seed)), None)
        if found is None:
            untouched = variant == "none"
            found = untrained("adapter") if untouched else one_run(arguments.part, variants[variant], steps, rate, seed)
            done.append(found)
            arguments.out.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{variant}: rate {rate:g}, seed {seed}: loss {found['loss']:.4f}", flush=True)
        return float(found["loss"])

    if arguments.part == "adapter":
        run("none", 0, 0)
    for variant in arguments.variants or variants:
        best = min(rates, key=lambda rate: run(variant, rate, arguments.seeds[0]))
        for seed in arguments.seeds[1:]:
            run(variant, best, seed)


if __name__ == "__main__":
    main()
