"""Renders docs/bank_results.md and its figures from the JSON files beside it.

    python benchmarks/bank_results.py

They come from benchmarks/bank_cost.py, examples/memory_comparison/compare.py and trained.py, and
examples/distributed/same_trajectory.py.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

from senri_hf.files import write_text
from senri_hf.interpretability.plots import figure, save


DOCS = Path(__file__).parent.parent / "docs"
PARTS = {"scratch": "Small models from scratch", "smollm2": "In SmolLM2-135M", "gemma": "In Gemma 3 270M"}
PLACES = {"scratch": "from scratch", "smollm2": "in SmolLM2-135M"}
MEMORY_BITS = 32


def table(names: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (names, ["---"] * len(names), *rows)]


def cost(found: dict[str, Any]) -> list[str]:
    setting = ", ".join(f"{name} {value}" for name, value in found["setting"].items())
    rows = [
        [
            row["strategy"],
            f"{row['rows']:,}",
            f"{row['seconds']:.2f}",
            f"{row['times']:.2f}",
            f"{row['table_seconds']:.2f}",
            f"{row['times_without_table']:.2f}",
            f"{row['rows_read']:.0%}",
        ]
        for row in found["time"]
    ]
    return [
        "## Time against the rows that are held",
        "",
        "A forward and backward pass; every token reads as many rows, whatever the bank holds. Its gradient is dense, "
        "as that of an embedding table is: how much of the time that is, is measured with a table of as many rows, of "
        "which the rows that some token read are looked up once a layer. By "
        f"`benchmarks/bank_cost.py` ({setting}), in seconds of the processor.",
        "",
        *table(
            [
                "routing",
                "rows held",
                "seconds",
                "times the smallest",
                "of these an embedding table",
                "times the smallest, table aside",
                "rows that some token read",
            ],
            rows,
        ),
        "",
    ]


def best_of(runs: list[dict[str, Any]], variant: str) -> list[dict[str, Any]]:
    """The runs of a variant at its best rates, of every seed, the one that was tuned with first."""
    tuned = [run for run in runs if run["variant"] == variant and run["seed"] == runs[0]["seed"]]
    rates = min(tuned, key=lambda run: run["tuning_loss"])["rates"]
    return [run for run in runs if run["variant"] == variant and run["rates"] == rates]


def comparison(part: str, found: dict[str, Any]) -> list[str]:
    runs = found["runs"]
    variants = list(dict.fromkeys(run["variant"] for run in runs))
    trained = next(run for run in runs if run["training_tokens"])
    rows = []
    for variant in variants:
        best = best_of(runs, variant)
        rates = ", ".join(f"{name} {rate:.3g}" for name, rate in best[0]["rates"].items())
        rows.append(
            [
                variant,
                f"{best[0]['trained_parameters']:,}",
                rates or "-",
                f"**{mean(run['loss'] for run in best):.3f}**",
                ", ".join(f"{run['loss']:.3f}" for run in best),
                f"{mean(run['seconds'] for run in best):.0f}",
            ]
        )
    draw_comparison(part, runs, variants)
    return [
        f"## {PARTS[part]}",
        "",
        f"Loss on held-out text ({trained['tokens']:,} tokens) after {trained['training_tokens']:,} training tokens "
        f"({found['steps']} steps), by `examples/memory_comparison/compare.py {part}`, which says how rates are tuned, "
        "on other held-out rows.",
        "",
        *table(["variant", "trained parameters", "rates", "loss, mean", "of each seed", "processor seconds"], rows),
        "",
        f"![Loss by learning rate and by variant](bank-{part}.png)",
        "",
    ]


def draw_comparison(part: str, runs: list[dict[str, Any]], variants: list[str]) -> None:
    """Left: loss where rates are chosen, by the rate tuned first, of the first seed. Right: loss at the best rates."""
    drawing, ((tuning, best),) = figure(1, 2, width=6.0, height=0.5 * len(variants) + 1.8)
    for place, variant in enumerate(variants):
        tuned = sorted(tuned_first([r for r in runs if r["variant"] == variant and r["seed"] == runs[0]["seed"]]))
        if len(tuned) > 1:
            tuning.plot(*zip(*tuned, strict=True), marker="o", label=variant, color=f"C{place}")
        losses = [run["loss"] for run in best_of(runs, variant)]
        best.plot(losses, [place] * len(losses), "o", color=f"C{place}")
    tuning.set_xscale("log")
    tuning.set(xlabel="learning rate (of memory, where there is one)", ylabel="loss where rates are chosen")
    tuning.legend(fontsize=7)
    best.set_yticks(range(len(variants)), variants, fontsize=8)
    best.invert_yaxis()
    best.set(xlabel="held-out loss at the best rate, of each seed")
    save(drawing, DOCS / f"bank-{part}.png")


def tuned_first(runs: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """Rate and loss of a variant's runs in which only the rate that is tuned first differs from those of the first."""
    first = runs[0]["rates"]
    axis = next((name for name in ("memory_lr", "lora_lr", "base_model_lr") if name in first), None)
    same = [run for run in runs if run["rates"].get("base_model_lr") == first.get("base_model_lr")]
    return [(run["rates"][axis], run["tuning_loss"]) for run in (runs if axis == "base_model_lr" else same) if axis]


def chapters(found: dict[str, Any]) -> list[str]:
    texts, count = list(found["usage"]), len(next(iter(found["usage"].values()))[0])
    layer = max(range(len(found["layers"])), key=lambda index: found["mutual_information"][index])
    rows = []
    for text in texts:
        usage = found["usage"][text][layer]
        order = sorted(range(count), key=lambda chapter: -usage[chapter])[: found["read"]]
        most = ", ".join(f"{chapter} ({usage[chapter]:.0%})" for chapter in order)
        rows.append([text, most, f"{found['entropy'][text][layer]:.2f}"])
    draw_chapters(found)
    told = ", ".join(
        f"{nats:.3f} in {number}" for number, nats in zip(found["layers"], found["mutual_information"], strict=True)
    )
    first, last = found["training"][0], found["training"][-1]
    return [
        "## Which chapters fire for which text",
        "",
        f"The memory in SmolLM2-135M above, trained on {found['trained_on']}; {found['tokens_of_a_text']:,} tokens of "
        f"each text, each of which reads {found['read']} of {count} chapters. Of layer {found['layers'][layer]}, where "
        "chapters tell texts apart most: the chapters that a text reads most, with their share of its reads, and the "
        f"mean entropy of a token's distribution over chapters (nats; at most ln {count} = {math.log(count):.2f}). By "
        "`examples/memory_comparison/trained.py`.",
        "",
        *table(["text", "chapters read most", "entropy"], rows),
        "",
        f"What a read's chapter tells of the text it is made in, by layer: {told} (nats, of ln {len(texts)} = "
        f"{math.log(len(texts)):.2f} at most). In training the entropy went from {first['router_entropy']:.2f} to "
        f"{last['router_entropy']:.2f}, and the share of the busiest chapter from {first['busiest_chapter']:.0%} to "
        f"{last['busiest_chapter']:.0%} (even: {1 / count:.0%}).",
        "",
        "![Share of reads by text and chapter](bank-chapters.png)",
        "",
        "![Entropy and busiest chapter in training](bank-routing-in-training.png)",
        "",
    ]


def draw_chapters(found: dict[str, Any]) -> None:
    """Shares of reads by text and chapter; entropy and the busiest chapter's share by training step."""
    layers, texts = found["layers"], list(found["usage"])
    drawing, (panels,) = figure(1, len(layers), width=max(2.4, 11.0 / len(layers)), height=2.8)
    most = max(max(shares) for text in texts for shares in found["usage"][text])
    for index, (layer, axes) in enumerate(zip(layers, panels, strict=True)):
        shares = [found["usage"][text][index] for text in texts]
        image = axes.imshow(shares, vmin=0, vmax=most, aspect="auto", cmap="viridis")
        axes.set_yticks(range(len(texts)), texts if index == 0 else [""] * len(texts), fontsize=8)
        axes.set(title=f"layer {layer}", xlabel="chapter")
    drawing.colorbar(image, ax=panels, label="share of reads")
    save(drawing, DOCS / "bank-chapters.png")
    drawing, ((entropy, busiest),) = figure(1, 2, width=4.5, height=2.8)
    steps = [entry["step"] for entry in found["training"]]
    for axes, key, label in (
        (entropy, "router_entropy", "router entropy, nats"),
        (busiest, "busiest_chapter", "share of reads of the busiest chapter"),
    ):
        axes.plot(steps, [entry[key] for entry in found["training"]])
        axes.set(xlabel="step", ylabel=label)
    save(drawing, DOCS / "bank-routing-in-training.png")


def bits(found: list[dict[str, Any]]) -> list[str]:
    whole = {(row["part"], row["variant"]): row for row in found if row["bits"] == MEMORY_BITS}
    rows = []
    for row in found:
        full = whole[row["part"], row["variant"]]
        held = [str(row["bits"]), f"{row['bytes']:,}", f"{full['bytes'] / row['bytes']:.2f}"]
        rows.append(
            [
                f"{row['variant']}, {PLACES[row['part']]}",
                *(held if row["bits"] else ["memory left out", "", ""]),
                f"{row['loss']:.4f}",
                f"{row['loss'] - full['loss']:+.6f}",
            ]
        )
    return [
        "## Banks in few bits",
        "",
        "Banks that were trained in 32 bits and made codes afterwards, scales included; loss on held-out text as "
        "above. What leaving memory out costs says how much there is to lose: hardly anything from scratch. A row of 8 "
        "bits has a scale of two bytes, so that it is never quite four times smaller. By "
        "`examples/memory_comparison/trained.py`.",
        "",
        *table(["model", "bits", "bytes of banks", "times smaller", "loss", "difference"], rows),
        "",
    ]


def distributed(found: dict[str, Any]) -> list[str]:
    rows = [
        [
            run["run"] + (f", killed and resumed at step {run['resumed_at']}" if run["resumed_at"] else ""),
            f"`{run['wrapped']['model']}`",
            f"{run['wrapped']['sharded']} of {run['wrapped']['parameters']}",
            f"{run['losses'][-1]:.4f}",
            f"{run['apart']:.1e}",
            f"{run['held_out_apart']:.1e}",
        ]
        for run in found["runs"]
    ]
    return [
        "## One trajectory",
        "",
        f"Runs of {found['steps']} steps by `accelerate launch` on CPUs; the killed ones got a SIGKILL to all "
        "processes after a checkpoint, and were resumed. The final model is loaded in a single process. Differences "
        "are those to the first row. All router losses are on, of the tokens of all processes. By "
        "`examples/distributed/same_trajectory.py`.",
        "",
        *table(
            [
                "run",
                "the model as it was wrapped",
                "parameters sharded",
                "last loss",
                "most that a step's loss differs",
                "held-out loss differs by",
            ],
            rows,
        ),
        "",
    ]


# What each file is, in the order of the page; what was not measured is left out.
SECTIONS: dict[str, Callable[[Any], list[str]]] = {
    "memory_comparison.json": lambda found: [
        line for part in PARTS if part in found for line in comparison(part, found[part])
    ],
    "bank_trained.json": lambda found: chapters(found["chapters"]) + bits(found["bits"]),
    "bank_cost.json": cost,
    "bank_distributed.json": distributed,
}


def page() -> str:
    """The page, of what is measured so far; its pictures are drawn on the way."""
    lines = ["# The bank, measured", ""]
    for name, section in SECTIONS.items():
        if (DOCS / name).exists():
            lines += section(json.loads((DOCS / name).read_text()))
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    write_text(DOCS / "bank_results.md", page())


if __name__ == "__main__":
    main()
