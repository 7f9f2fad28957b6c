"""Does a memory bank help? Memory beside dense models, and beside LoRA, on books, at tuned learning rates.

    python examples/memory_comparison/compare.py scratch     # small models from scratch: dense, wider dense, memory
    python examples/memory_comparison/compare.py smollm2     # none, memory, LoRA and both in SmolLM2-135M
    python examples/memory_comparison/compare.py gemma       # and in Gemma 3 270M

A variant's learning rates are tuned with the first seed, one after the other: each climbs by a factor until both
neighbours of the best are worse, and the best ones are run with the other seeds. From scratch the memory's own rate is
tuned first, while all else learns at the rate that serves the dense model best, and then that of all else; memory and
LoRA together have their own best rates, times a common factor that is tuned. The last tenth of each book is held out:
rates are chosen on some of it, losses are reported of other rows.

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
Rates = dict[str, float]
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
    """Settings, the learning rates to begin with, given the best of other variants, and how those are tuned.

    Attributes:
        tuned: Names of rates that are tuned together, with the factor of a step; one group after the other.
    """

    settings: list[str]
    start: Callable[[dict[str, Rates]], Rates]
    tuned: dict[tuple[str, ...], float]


@dataclass
class Part:
    """A comparison: the file that its runs begin from, what they share, and its variants in their order."""

    config: str
    settings: list[str]
    steps: int
    seeds: tuple[int, ...]
    evaluated: int  # held-out rows, and as many others that rates are chosen on
    variants: dict[str, Variant]


def dense(settings: list[str]) -> Variant:
    return Variant(settings, lambda _: {"base_model_lr": 0.004}, {("base_model_lr",): 2})


def bank(*settings: str) -> Variant:
    return Variant(
        list(settings), lambda best: {**best["dense"], "memory_lr": 0.001}, {("memory_lr",): 4, ("base_model_lr",): 2}
    )


WHOLE = "use_chapters=false"
ADAPTED = {
    "none": Variant(["vanilla_mode=true"], lambda _: {}, {}),
    "memory": Variant([], lambda _: {"memory_lr": 0.009}, {("memory_lr",): 3}),
    "LoRA": Variant(["use_lora=true", "use_memory_adapter=false"], lambda _: {"lora_lr": 0.003}, {("lora_lr",): 3}),
    "memory and LoRA": Variant(
        ["use_both_memory_and_lora=true"],
        lambda best: {**best["memory"], **best["LoRA"]},
        {("memory_lr", "lora_lr"): 3},
    ),
}


def adapted(base: str) -> Part:
    """The four comparisons in a model that exists."""
    return Part(
        "adapter_smollm2_cpu.yaml",
        [f"base_model_name={base}", "max_length=64", "batch_size=2"],
        steps=40,
        seeds=(0, 1),
        evaluated=36,
        variants=ADAPTED,
    )


PARTS = {
    "scratch": Part(
        "base_small_cpu.yaml",
        [
            f"hidden_dim={HIDDEN}", f"num_layers={LAYERS}", f"intermediate_dim={INNER}", f"max_length={LENGTH}",
            f"batch_size={BATCH}", "vocab_size=512", f"memory_layer_n={LAYERS // MEMORY_LAYERS}",
            f"tokenizer_name={MODELS / 'tokenizer'}",
        ],
        steps=480,
        seeds=(0, 1),
        evaluated=230,
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
    "smollm2": adapted("smollm2-135m-instruct"),
    "gemma": adapted("gemma-3-270m"),
}  # fmt: skip


def configured(part: Part, variant: str, rates: Rates, seed: int, steps: int, folder: Path) -> RunConfig:
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


def held_out(run: runs.Run, part: Part, tuning: bool = False) -> dict[str, float]:
    """Loss and perplexity on the test split, on the rows that rates are chosen on or on others."""
    rows, count = runs.encoded(run, "test"), part.evaluated
    if len(rows) < 2 * count:
        raise ValueError(f"The test split has {len(rows)} rows, but {2 * count} are needed")
    return perplexity(
        run.model,
        rows[count : 2 * count] if tuning else rows[:count],
        runs.collator(run),
        run.config.training.batch_size,
    )


def one_run(part: Part, variant: str, rates: Rates, seed: int, steps: int, folder: Path) -> dict[str, Any]:
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
        "tuning_loss": held_out(run, part, tuning=True)["loss"],
        "seconds": round(seconds, 1),
        "trained_parameters": sum(p.numel() for p in run.model.parameters() if p.requires_grad) if rates else 0,
        "training_tokens": tokens if rates else 0,
    }


def climb(loss_of: Callable[[int], float]) -> int:
    """The number of steps up, negative for down, whose neighbours are both worse."""
    tried: dict[int, float] = {}
    at = 0
    while True:
        for place in (at, at + 1, at - 1):
            if place not in tried:
                tried[place] = loss_of(place)
        best = min(tried, key=lambda place: tried[place])
        if best == at:
            return at
        at = best


def folder_of(out: Path, part: str, variant: str, rates: Rates, seed: int) -> Path:
    """Where the model of a run is."""
    name = "-".join([variant.replace(",", "").replace(" ", "_"), *(f"{rate:g}" for rate in rates.values()), str(seed)])
    return MODELS / out.stem / part / name


def best_folder(out: Path, part: str, variant: str) -> Path:
    """Where the best model of a variant is, of the first seed.

    Raises:
        OSError: when it was not trained here.
    """
    found = json.loads(out.read_text())[part]["runs"] if out.exists() else []
    tried = [one for one in found if one["variant"] == variant and one["seed"] == found[0]["seed"]]
    if not tried:
        raise OSError(f"{out} has no run of {variant!r}: python examples/memory_comparison/compare.py {part}")
    best = min(tried, key=lambda one: one["tuning_loss"])
    folder = folder_of(out, part, variant, best["rates"], best["seed"])
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

    def run(variant: str, rates: Rates, seed: int) -> float:
        key = {"variant": variant, "rates": rates, "seed": seed}
        done = next((one for one in found["runs"] if key.items() <= one.items()), None)
        if done is None:
            done = {**key, **one_run(part, variant, rates, seed, steps, folder_of(out, name, variant, rates, seed))}
            found["runs"].append(done)
            write_json(out, results)
        said = ", ".join(f"{rate} {value:g}" for rate, value in rates.items())
        print(
            f"{variant}: {said or 'nothing trained'}, seed {seed}: loss {done['loss']:.4f}, where rates are chosen "
            f"{done['tuning_loss']:.4f}, {done['seconds']} s",
            flush=True,
        )
        return float(done["tuning_loss"])

    best: dict[str, Rates] = {}
    for variant, settings in part.variants.items():
        rates = settings.start(best)
        for names, factor in settings.tuned.items():

            def scaled(place: int, rates: Rates = rates, names: tuple[str, ...] = names, step: float = factor) -> Rates:
                return {n: float(f"{rate * step**place:.3g}") if n in names else rate for n, rate in rates.items()}

            rates = scaled(climb(lambda place, variant=variant, scaled=scaled: run(variant, scaled(place), seeds[0])))  # type: ignore[misc]
        best[variant] = rates
        for seed in seeds if rates else seeds[:1]:
            run(variant, rates, seed)


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
    parser.add_argument("--steps", type=int, help="of a run, where not those of the part")
    parser.add_argument("--seeds", type=int, nargs="+", help="those of the part where not given: 0 and 1")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    if arguments.part == "scratch":
        tokenizer_of_all()
    part = PARTS[arguments.part]
    compare(arguments.part, arguments.seeds or list(part.seeds), arguments.steps or part.steps, arguments.out)


if __name__ == "__main__":
    main()
