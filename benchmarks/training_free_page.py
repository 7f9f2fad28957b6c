"""The page of results of memory without training, from the JSON that its benchmarks write."""

import re
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from training_free_grid import DISTRACTORS, EPISODES, LIFE, SEEDS, SUITES, cell, methods

from senri_hf.files import whole, write_text


MARKS = {"kept in context": "s", "text prepended": "^", "no memory": "x", "trained adapter": "*"}
COLOURS = {"surprise": "tab:blue", "recent": "tab:orange", "random": "tab:green"}


def pooled(runs: dict[str, dict[str, Any]], key: str = "recall") -> tuple[float, int]:
    """A share over all seeds, and of how many answers."""
    answers = sum(run["answers"] for run in runs.values())
    return sum(run[key] * run["answers"] for run in runs.values()) / answers, answers


def size_of(runs: dict[str, dict[str, Any]]) -> float:
    return float(sum(run["bytes"] for run in runs.values()) / len(runs))


def order(method: str) -> tuple[int, int, str]:
    """Baselines first, then by slots and policy."""
    slots = re.search(r"(\d+) slots", method)
    return (1, int(slots[1]), method) if slots else (0, list(MARKS).index(method), method)


def recall_table(suites: dict[str, Any]) -> list[str]:
    methods = sorted({method for found in suites.values() for method in found}, key=order)
    lines = ["| method | kB per person | " + " | ".join(suites) + " |", "|---|---|" + "---|" * len(suites)]
    for method in methods:
        cells, sizes = [], []
        for found in suites.values():
            runs = found.get(method)
            if runs is None:
                cells.append("")
                continue
            share, answers = pooled(runs)
            free = {
                seed: run | {"answers": run["episodes"]} for seed, run in runs.items() if run.get("free") is not None
            }
            own = f" · {pooled(free, 'free')[0]:.0%}" if free else ""
            cells.append(f"{share:.1%} ({answers}){own}")
            sizes.append(size_of(runs) / 1000)
        low, high = round(min(sizes)), round(max(sizes))
        lines.append(f"| {method} | {low:,}{'' if low == high else f' to {high:,}'} | " + " | ".join(cells) + " |")
    return lines


def difference(ours: dict[str, dict[str, Any]], theirs: dict[str, dict[str, Any]]) -> tuple[float, float]:
    """How much more of the episodes that both had is recalled, and the half width of its 95% interval."""
    gains: list[float] = []
    for part in ours.keys() & theirs.keys():
        each = ours[part]["answers"] // ours[part]["episodes"]
        pairs = list(zip(ours[part]["right"], theirs[part]["right"], strict=True))
        episodes = (pairs[start : start + each] for start in range(0, len(pairs), each))
        gains += [sum(int(a) - int(b) for a, b in episode) / each for episode in episodes]
    spread = stdev(gains) if len(gains) > 1 else float("inf")
    return mean(gains), 1.96 * spread / len(gains) ** 0.5


def verdict(ours: dict[str, dict[str, Any]], theirs: dict[str, dict[str, Any]], other: str) -> str:
    gain, width = difference(ours, theirs)
    said = "better than" if gain > width else "worse than" if gain < -width else "not told apart from"
    return f"{said} {other} ({100 * gain:+.0f} ± {100 * width:.0f} points)"


def comparisons(suites: dict[str, Any]) -> list[str]:
    """Surprise beside recent and random at the same number of slots, and beside the whole context at a third of it."""
    lines = []
    for suite, found in suites.items():
        said = []
        context = found.get("kept in context")
        for method, runs in sorted(found.items(), key=lambda item: order(item[0])):
            if not method.startswith("surprise"):
                continue
            others = {policy: found.get(method.replace("surprise", policy)) for policy in ("recent", "random")}
            verdicts = [verdict(runs, theirs, policy) for policy, theirs in others.items() if theirs]
            if context is not None:
                share = size_of(runs) / size_of(context)
                verdicts.append(verdict(runs, context, f"the whole context, with {share:.0%} of its bytes"))
            said += [f"  - {method}: {', '.join(verdicts)}"] if verdicts else []
        if said:
            lines += [f"- {suite}:", *said]
    return lines


def not_run(found: dict[str, Any]) -> list[str]:
    """What of the whole grid is missing."""
    cells = [(cell(suite, count), method) for suite in SUITES for count in DISTRACTORS for method in methods()]
    episodes = {
        place: sum(run["episodes"] for run in found.get(place[0], {}).get(place[1], {}).values()) for place in cells
    }
    begun = [count for count in episodes.values() if count]
    whole = sum(count == EPISODES * SEEDS for count in begun)
    if not begun or whole == len(cells):
        return []
    spread = f"{min(begun)} to {max(begun)}" if min(begun) < max(begun) else str(min(begun))
    return [
        f"Of the {len(cells)} cells of the grid ({len(SUITES)} suites, {len(methods())} methods, "
        f"{', '.join(map(str, DISTRACTORS))} distractors) {len(begun)} were run, on {spread} episodes each. The whole "
        f"grid has {EPISODES} episodes of {SEEDS} seeds in each, which {whole} of its cells have.",
        "",
    ]


def plot_recall(suites: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [suite for suite in SUITES if any(cell(suite, count) in suites for count in DISTRACTORS)]
    counts = [count for count in DISTRACTORS if any(cell(suite, count) in suites for suite in SUITES)]
    size = (4.2 * len(counts) + 0.6, 3.2 * len(rows) + 0.4)
    figure, axes = plt.subplots(len(rows), len(counts), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for suite, line in zip(rows, axes, strict=True):
        for count, axis in zip(counts, line, strict=True):
            found = suites.get(cell(suite, count), {})
            for policy, colour in COLOURS.items():
                points = sorted((size_of(r) / 1000, pooled(r)[0]) for m, r in found.items() if m.startswith(policy))
                if points:
                    axis.plot(*zip(*points, strict=True), marker="o", color=colour, label=policy)
            for method, mark in MARKS.items():
                if method in found:
                    runs = found[method]
                    axis.plot(size_of(runs) / 1000, pooled(runs)[0], mark, color="black", label=method, ls="none")
            axis.set_title(cell(suite, count), fontsize=10)
            axis.grid(alpha=0.3)
        line[0].set_ylabel("right answers")
    for axis in axes[-1]:
        axis.set_xlabel("kB kept per person")
    unique: dict[str, Any] = {}
    for axis in axes.flat:
        handles, labels = axis.get_legend_handles_labels()
        unique |= dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), fontsize=8, loc="outside right upper")
    with whole(path) as scratch:
        figure.savefig(scratch, format="png", dpi=100)
    plt.close(figure)


def plot_life(life: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4))
    titles = {"recall": "facts of the first conversations recalled", "bytes": "MB of memory", "decode": "ms per token"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        scale = 1e-6 if key == "bytes" else 1.0
        axis.plot(life["conversations"], [value * scale for value in life[key]], marker="o")
        axis.set_xscale("log")
        axis.set_ylim(0, 1 if key == "recall" else None)
        axis.set_xlabel("conversations since")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    with whole(path) as scratch:
        figure.savefig(scratch, format="png", dpi=110)
    plt.close(figure)


def life_table(life: dict[str, Any]) -> list[str]:
    head = " | ".join(f"{count:,}" for count in life["conversations"])
    return [
        f"| conversations since | {head} |",
        "|---|" + "---|" * len(life["conversations"]),
        "| recall | " + " | ".join(f"{value:.0%}" for value in life["recall"]) + " |",
        "| MB of memory | " + " | ".join(f"{value / 1e6:.1f}" for value in life["bytes"]) + " |",
        "| decoding, ms per token | " + " | ".join(f"{value:.1f}" for value in life["decode"]) + " |",
    ]


def sweep_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| told | settings | recall | nats per value | tokens kept |", "|---|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| {row['told']} | {row['settings']} | {row['recall']:.1%} ({row['answers']}) | {row['nats']:.2f} | "
            f"{row['tokens']:.0f} |"
        )
    return lines


def cost_table(cost: dict[str, float]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {value:,.4g} |" for name, value in cost.items())]


def write_page(results: dict[str, Any], folder: Path) -> None:
    """`training_free_results.md` and its plots."""
    lines = [
        "# Memory without training: results",
        "",
        "Written from `training_free.json` beside it by the benchmarks that each section names. Shares are of answers",
        "that `generate()` gives to a reply begun up to the value; their number is in brackets, as all facts of an",
        "episode are asked. After a dot: of replies that were not begun. An empty cell was not run.",
    ]
    for model in dict.fromkeys(name for part in results.values() for name in part):
        recall, sweep, life, cost = (results.get(key, {}).get(model) for key in ("recall", "sweep", "life", "cost"))
        lines += ["", f"## {model}"]
        if recall:
            lines += [
                "",
                "### Recall",
                "",
                f"`python benchmarks/training_free.py --model {model}`, values and phrasings of validation.",
                "",
            ]
            lines += not_run(recall)
            lines += [f"![recall against bytes](training-free-{model}.png)", "", *recall_table(recall)]
            lines += ["", "Held against each other, episode by episode, with 95% intervals:", "", *comparisons(recall)]
            plot_recall(recall, folder / f"training-free-{model}.png")
        if sweep:
            lines += ["", "### What to keep", ""]
            lines += [
                f"`python benchmarks/training_free_settings.py --model {model}`, values and phrasings of training.",
                "Nats: how much a value surprises where it would be right, the less the better.",
                "",
                *sweep_table(sweep),
            ]
        if life:
            lines += [
                "",
                "### A long life",
                "",
                f"`python benchmarks/training_free_life.py --model {model}`: {life['what']}.",
                "",
            ]
            lines += [f"![a long life](training-free-life-{model}.png)", "", *life_table(life)]
            if life["conversations"][-1] < LIFE:
                lines += ["", f"Of the {LIFE:,} conversations {life['conversations'][-1]:,} were run."]
            plot_life(life, folder / f"training-free-life-{model}.png")
        if cost:
            lines += [
                "",
                "### Cost",
                "",
                f"`python benchmarks/training_free_life.py --model {model} --cost`, one thread.",
                "",
            ]
            lines += cost_table(cost)
    path = folder / "training_free_results.md"
    write_text(path, "\n".join(lines).rstrip() + "\n")
