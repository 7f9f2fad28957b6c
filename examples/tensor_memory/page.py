"""Renders docs/tensor_memory_results.md from docs/tensor_memory.json and docs/tensor_memory_speed.json.

python examples/tensor_memory/page.py
"""

import json
from typing import Any

from settings import PAGE, RESULTS

from senri_hf.files import write_text


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A table of markdown."""
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]


def speed(found: dict[str, Any]) -> list[str]:
    setting = ", ".join(f"{name} {value}" for name, value in found["setting"].items())
    ways = ["forward", "forward and backward"]
    rows = [[name, *(f"{taken[way]:.3f}" for way in ways)] for name, taken in found["seconds"].items()]
    ratios = [[name, *(f"{found[name][way]:.2f}" for way in ways)] for name in found if " times " in f" {name}"]
    return [
        "## Speed",
        "",
        f"By `benchmarks/tensor_memory.py`: processor seconds of one memory layer on one thread ({setting}).",
        "",
        *table(["layer", *ways], rows),
        *table(["ratio", *ways], ratios),
    ]


def recall(found: dict[str, Any]) -> list[str]:
    pairs = list(next(iter(found.values()))["accuracy"])
    rows = [
        [name, f"{run['parameters']:,}", f"{run['tokens trained on']:,}", *(f"{run['accuracy'][n]:.1%}" for n in pairs)]
        for name, run in found.items()
    ]
    return [
        "## Associative recall",
        "",
        "By `examples/tensor_memory/compare.py`: the share of values that are predicted when their keys come again.",
        "",
        *table(["model", "parameters", "tokens trained on", *pairs], rows),
    ]


def text(found: dict[str, Any]) -> list[str]:
    tested = found["tokens tested"]
    models = {name: run for name, run in found.items() if isinstance(run, dict) and "perplexity" in run}
    rows = [
        [name, f"{run['parameters']:,}", *(f"{run['perplexity'][part]:.1f}" for part in tested)]
        for name, run in models.items()
    ]
    return [
        "## Perplexity by distance of the needed context",
        "",
        f"By `examples/tensor_memory/compare.py`, after {found['tokens trained on']:,} tokens of books, on a book that "
        "was not read. A column is of the tokens that complete a pair of tokens which is rare in the training books, "
        "last seen so many tokens before.",
        "",
        *table(["model", "parameters", *tested], [*rows, ["tokens", "", *(f"{count:,}" for count in tested.values())]]),
    ]


def order(found: dict[str, Any]) -> list[str]:
    rows = [[name, f"{value:.1%}"] for name, value in found.items() if isinstance(value, float)]
    pairs = found["pairs"]
    return [
        "## Which of two words came first",
        "",
        f"By `examples/tensor_memory/order.py`: {pairs['trained']} pairs of words are trained on, {pairs['held out']} "
        "are held out; all answers are from memory alone.",
        "",
        *table(["", "right"], rows),
    ]


def windows(found: dict[str, Any]) -> list[str]:
    parts = ["trained with carried memory", "trained with reset memory"]
    counts = list(found[parts[0]])
    between, process = found["documents between, 4 pairs each"], found["another process, 8 pairs"]
    return [
        "## Memory from window to window, across documents and processes",
        "",
        "By `examples/tensor_memory/windows.py`: pairs are told in one window and asked for in the next, with memory "
        "carried in the test.",
        "",
        *table(["", *counts], [[part, *(f"{found[part][count]:.1%}" for count in counts)] for part in parts]),
        "Documents of other pairs that are read between being told and being asked, of 4 pairs each:",
        "",
        *table(["documents", *between], [["recalled", *(f"{value:.1%}" for value in between.values())]]),
        "A memory that is saved, and asked in another process, 8 pairs:",
        "",
        *table(
            ["", ""],
            [[name, f"{value:.1%}" if isinstance(value, float) else f"{value:,}"] for name, value in process.items()],
        ),
    ]


if __name__ == "__main__":
    everything = json.loads(RESULTS.read_text())
    lines = ["# Tensor memory, measured", ""]
    lines += recall(everything["recall"]) + text(everything["text"]) + order(everything["order"])
    lines += windows(everything["windows"])
    lines += speed(json.loads(RESULTS.with_name("tensor_memory_speed.json").read_text()))
    write_text(PAGE, "\n".join(lines).rstrip() + "\n")
