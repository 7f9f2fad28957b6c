"""Renders docs/bank_results.md from docs/bank_cost.json and docs/memory_comparison.json.

python benchmarks/bank_results.py
"""

import json
from pathlib import Path
from statistics import mean
from typing import Any


DOCS = Path(__file__).parent.parent / "docs"
PARTS = {"scratch": "Small models from scratch", "adapter": "In SmolLM2-135M"}


def cost(found: dict[str, Any]) -> list[str]:
    setting = ", ".join(f"{name} {value}" for name, value in found["setting"].items())
    lines = [
        "## Time against the rows that are held",
        "",
        "A forward and backward pass; every token reads as many rows, whatever the bank holds. By "
        f"`benchmarks/bank_cost.py` ({setting}), on a machine that others used too.",
        "",
        "| routing | rows held | seconds | times the smallest | chapters that some token read |",
        "|---|---|---|---|---|",
    ]
    for row in found["time"]:
        lines.append(
            f"| {row['strategy']} | {row['rows']:,} | {row['seconds']:.2f} | {row['times']:.2f} | "
            f"{row['chapters_read']:.0%} |"
        )
    return [*lines, ""]


def comparison(part: str, variants: dict[str, list[dict[str, Any]]]) -> list[str]:
    first = next(run for runs in variants.values() for run in runs if run["training_tokens"])
    lines = [
        f"## {PARTS[part]}",
        "",
        f"Loss on held-out text ({first['tokens']:,} tokens) after {first['training_tokens']:,} training tokens, by "
        f"`examples/memory_comparison/compare.py {part}`. Every learning rate is tried with seed 0; the better one is "
        "run with the other seeds.",
        "",
        "| variant | trained parameters | learning rate | loss, mean over seeds | of each seed | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in variants.items():
        rate = min((run for run in runs if run["seed"] == 0), key=lambda run: run["loss"])["rate"]
        best = [run for run in runs if run["rate"] == rate]
        losses = [run["loss"] for run in best]
        each = ", ".join(f"{loss:.3f}" for loss in losses)
        seconds = round(mean(run["seconds"] for run in best))
        parameters = best[0]["trained_parameters"]
        lines.append(f"| {name} | {parameters:,} | {rate:g} | {mean(losses):.3f} | {each} | {seconds} |")
    return [*lines, ""]


def main() -> None:
    lines = ["# The bank, measured", ""]
    lines += cost(json.loads((DOCS / "bank_cost.json").read_text()))
    for part, variants in json.loads((DOCS / "memory_comparison.json").read_text()).items():
        lines += comparison(part, variants)
    (DOCS / "bank_results.md").write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
