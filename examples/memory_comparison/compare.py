"""Does a memory bank help? Memory beside dense models, and beside LoRA, on books, at tuned learning rates.

    python examples/memory_comparison/compare.py scratch     # small models from scratch: dense, wider dense, memory
    python examples/memory_comparison/compare.py adapter     # none, memory, LoRA and both in a model that exists

A variant's learning rate is tuned with the first seed: from the middle of a ladder of rates it climbs until both
neighbours of the best are worse, and the best one is run with the other seeds. From scratch all else than memory learns
at the rate that serves the dense model best, and memory's own is tuned; memory and LoRA together have their own best
rates, times a common factor that is tuned. The last tenth of each book is held out.

Finished runs stand in --out, and their models below checkpoints/memory_comparison/: an interrupted comparison goes on
where it was.
`trained.py` looks into the models, and `benchmarks/bank_results.py` renders what came out.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from senri_hf.commands.evaluate import perplexity
from senri_hf.configuration.run import RunConfig
from senri_hf.files import write_json
from senri_hf.training import run as runs


ROOT = Path(__file__).parent.parent.parent
OUT = ROOT / "docs" / "memory_comparison.json"
MODELS = ROOT / "checkpoints" / "memory_comparison"
HIDDEN, LAYERS, MEMORY_LAYERS, INNER, LENGTH, BATCH = 64, 4, 2, 172, 64, 16


def wider(parameters: float) -> list[str]:
    """Settings of a dense model with so many more parameters: multiplications of a token are as many."""
    inner = INNER + round(parameters / (3 * HIDDEN * LAYERS))
    return ["vanilla_mode=true", f"intermediate_dim={inner}"]


def memory_parameters(rows: int) -> int:
    return rows * HIDDEN + MEMORY_LAYERS * 4 * HIDDEN**2


def memory_multiplications(rows: int) -> float:
    """Of a token: queries and outputs, its share of the rows' keys and values, scores and sums."""
    return MEMORY_LAYERS * (2 * HIDDEN**2 + rows * 2 * HIDDEN**2 / (LENGTH * BATCH) + 2 * rows * HIDDEN)


@dataclass
class Variant:
    """Settings, and those that a rung of the ladder of learning rates stands for, given the best of other variants."""

    settings: list[str]
    rates: Callable[[float, dict[str, float]], dict[str, float]]
    ladder: tuple[float, ...]


@dataclass
class Part:
    """A comparison: the file that its runs begin from, what they share, and its variants in their order."""

    config: str
    settings: list[str]
    steps: int
    seeds: tuple[int, ...]
    evaluated: int  # held-out rows
    variants: dict[str, Variant]


def factors(step: float, below: int, above: int, start: float = 1.0) -> tuple[float, ...]:
    """A ladder: `start` times the powers of `step`."""
    return tuple(float(f"{start * step**power:.3g}") for power in range(-below, above + 1))


BASE_RATES, MEMORY_RATES = factors(2, 2, 2, start=0.008), factors(4, 2, 2, start=0.004)
ADAPTER_RATES = factors(3, 2, 2, start=0.003)


def dense(settings: list[str]) -> Variant:
    return Variant(settings, lambda rate, _: {"base_model_lr": rate}, BASE_RATES)


def bank(*settings: str) -> Variant:
    def rates(rate: float, best: dict[str, float]) -> dict[str, float]:
        return {"base_model_lr": best["dense"], "memory_lr": rate}

    return Variant(list(settings), rates, MEMORY_RATES)


def both(factor: float, best: dict[str, float]) -> dict[str, float]:
    return {"memory_lr": best["memory"] * factor, "lora_lr": best["LoRA"] * factor}


WHOLE = "use_chapters=false"
PARTS = {
    "scratch": Part(
        "base_small_cpu.yaml",
        [
            f"hidden_dim={HIDDEN}", f"num_layers={LAYERS}", f"intermediate_dim={INNER}", f"max_length={LENGTH}",
            f"batch_size={BATCH}", "vocab_size=512", f"memory_layer_n={LAYERS // MEMORY_LAYERS}",
            f"tokenizer_name={MODELS / 'tokenizer'}",
        ],
        steps=96,
        seeds=(0, 1),
        evaluated=480,
        variants={
            "dense": dense(["vanilla_mode=true"]),
            "dense, parameters of memory 256": dense(wider(memory_parameters(256))),
            "dense, multiplications of memory 256": dense(wider(memory_multiplications(256))),
            "memory 64": bank("num_memory_tokens=64", WHOLE),
            "memory 256": bank("num_memory_tokens=256", WHOLE),
            "memory 1024": bank("num_memory_tokens=1024", WHOLE),
            "memory 256, 4 of 16 chapters": bank("num_memory_tokens=256"),
        },
    ),
    "adapter": Part(
        "adapter_smollm2_cpu.yaml",
        ["max_length=64", "batch_size=2"],
        steps=20,
        seeds=(0,),
        evaluated=16,
        variants={
            "none": Variant(["vanilla_mode=true"], lambda *_: {}, ()),
            "memory": Variant([], lambda rate, _: {"memory_lr": rate}, ADAPTER_RATES),
            "LoRA": Variant(
                ["use_lora=true", "use_memory_adapter=false"], lambda rate, _: {"lora_lr": rate}, ADAPTER_RATES
            ),
            "memory and LoRA": Variant(["use_both_memory_and_lora=true"], both, factors(3, 1, 0)),
        },
    ),
}  # fmt: skip


def configured(part: Part, variant: str, rates: dict[str, float], seed: int, steps: int, folder: Path) -> RunConfig:
    """A run that is evaluated at its end only."""
    once = [f"max_steps={steps}", f"warmup_steps={steps // 10}", "eval_split=null", "save_best_model=false"]
    ends = [f"save_steps={steps}", "save_total_limit=1", f"logging_steps={max(1, steps // 40)}", f"seed={seed}"]
    return RunConfig.load(
        ROOT / "examples" / "configs" / part.config,
        [
            *part.settings, *part.variants[variant].settings, *[f"{name}={rate}" for name, rate in rates.items()],
            *once, *ends, f"output_dir={folder}",
        ],
    )  # fmt: skip


def held_out(run: runs.Run, part: Part) -> dict[str, float]:
    """Loss and perplexity on the test split."""
    rows = runs.encoded(run, "test")[: part.evaluated]
    return perplexity(run.model, rows, runs.collator(run), run.config.training.batch_size)


def one_run(part: Part, variant: str, rates: dict[str, float], seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """Train where there is something to train, and the loss on what was held out."""
    config = configured(part, variant, rates, seed, steps, folder)
    run, seconds = runs.prepare(config), 0.0
    if rates:
        trainer = runs.trainer_of(run)
        start = time.process_time()  # of the processor: a machine that others use too tells no other time
        trainer.train()
        seconds = time.process_time() - start
        runs.save(run, trainer)
    section = config.training
    tokens = steps * section.batch_size * section.gradient_accumulation_steps * section.max_length
    return {
        **held_out(run, part),
        "seconds": round(seconds, 1),
        "trained_parameters": sum(p.numel() for p in run.model.parameters() if p.requires_grad) if rates else 0,
        "training_tokens": tokens if rates else 0,
    }


def climb(ladder: tuple[float, ...], loss_of: Callable[[float], float]) -> float:
    """The rung whose neighbours are both worse, as far as there are any, found from the middle."""
    tried: dict[int, float] = {}
    at = len(ladder) // 2
    while True:
        for place in (at, at + 1, at - 1):
            if place not in tried and 0 <= place < len(ladder):
                tried[place] = loss_of(ladder[place])
        best = min(tried, key=lambda place: tried[place])
        if best == at:
            return ladder[at]
        at = best


def folder_of(out: Path, part: str, variant: str, rung: float, seed: int) -> Path:
    """Where the model of a run is."""
    return MODELS / out.stem / part / f"{variant.replace(',', '').replace(' ', '_')}-{rung:g}-{seed}"


def best_folder(out: Path, part: str, variant: str) -> Path:
    """Where the best model of a variant is, of the first seed.

    Raises:
        OSError: when it was not trained here.
    """
    found = json.loads(out.read_text())[part]["runs"] if out.exists() else []
    tried = [one for one in found if one["variant"] == variant and one["seed"] == found[0]["seed"]]
    if not tried:
        raise OSError(f"{out} has no run of {variant!r}: python examples/memory_comparison/compare.py {part}")
    best = min(tried, key=lambda one: one["loss"])
    folder = folder_of(out, part, variant, best["rung"], best["seed"])
    if not folder.is_dir():
        raise OSError(f"There is no {folder}; the run was made elsewhere: give compare.py another --out")
    return folder


def compare(name: str, seeds: list[int], steps: int, out: Path) -> None:
    """Run what is not in `out` yet."""
    part = PARTS[name]
    results: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    found = results.setdefault(name, {"steps": steps, "runs": []})
    if found["steps"] != steps:
        raise SystemExit(f"{out} has runs of {found['steps']} steps, not {steps}; give another --out")

    def run(variant: str, rung: float, seed: int) -> float:
        rates = part.variants[variant].rates(rung, best) if rung else {}
        key = {"variant": variant, "rung": rung, "rates": rates, "seed": seed}
        done = next((one for one in found["runs"] if key.items() <= one.items()), None)
        if done is None:
            folder = folder_of(out, name, variant, rung, seed)
            done = {**key, **one_run(part, variant, rates, seed, steps, folder)}
            found["runs"].append(done)
            write_json(out, results)
        print(f"{variant}: rate {rung:g}, seed {seed}: loss {done['loss']:.4f}, {done['seconds']} s", flush=True)
        return float(done["loss"])

    best: dict[str, float] = {}
    for variant, settings in part.variants.items():
        if not settings.ladder:
            run(variant, 0, seeds[0])
            continue
        best[variant] = climb(settings.ladder, lambda rung, variant=variant: run(variant, rung, seeds[0]))  # type: ignore[misc]
        for seed in seeds[1:]:
            run(variant, best[variant], seed)


def tokenizer_of_all() -> None:
    """Train the tokenizer of the models from scratch, once for all of them."""
    if not (MODELS / "tokenizer").is_dir():
        part = PARTS["scratch"]
        config = configured(part, "dense", {}, 0, 1, MODELS)
        config.model.tokenizer_name = None
        runs.own_tokenizer(config).save_pretrained(MODELS / "tokenizer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--steps", type=int, help="of a run: 96 from scratch, 20 in a model that exists")
    parser.add_argument("--seeds", type=int, nargs="+", help="0 and 1 from scratch, 0 in a model that exists")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    if arguments.part == "scratch":
        tokenizer_of_all()
    part = PARTS[arguments.part]
    compare(arguments.part, arguments.seeds or list(part.seeds), arguments.steps or part.steps, arguments.out)


if __name__ == "__main__":
    main()
