"""The page of results of memory without training, from the JSON that its benchmarks write."""

import re
from pathlib import Path
from typing import Any


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


def comparisons(suites: dict[str, Any]) -> list[str]:
    """Surprise beside recent and random at the same number of slots, and beside the whole context at a third of it."""
    lines = []
    for suite, found in suites.items():
        said = []
        shares = {method: pooled(runs)[0] for method, runs in found.items()}
        for method in sorted(found, key=order):
            if not method.startswith("surprise"):
                continue
            others = {policy: shares.get(method.replace("surprise", policy)) for policy in ("recent", "random")}
            known = {policy: share for policy, share in others.items() if share is not None}
            for beaten, verb in ((True, "beats"), (False, "does not beat")):
                named = [f"{p} ({share:.1%})" for p, share in known.items() if (shares[method] > share) == beaten]
                if named:
                    said.append(f"{method} ({shares[method]:.1%}) {verb} {' and '.join(named)}")
        context = found.get("kept in context")
        if context is not None:
            share, size = shares["kept in context"], size_of(context)
            small = {m: r for m, r in found.items() if m.startswith("surprise") and size_of(r) <= size / 3}
            if small:
                best = max(small, key=lambda method: shares[method])
                ours = shares[best]
                verdict = "as good or better" if ours >= share else "worse"
                said.append(
                    f"at no more than a third of the whole context's bytes {best} recalls {ours:.1%} where the whole "
                    f"context gives {share:.1%}: {verdict}"
                )
        if said:
            lines.append(f"- {suite}: " + "; ".join(said) + ".")
    return lines


def plot_recall(suites: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(suites), figsize=(4.2 * len(suites), 3.8), sharey=True, squeeze=False)
    for axis, (suite, found) in zip(axes[0], suites.items(), strict=True):
        for policy, colour in COLOURS.items():
            points = sorted((size_of(r) / 1000, pooled(r)[0]) for m, r in found.items() if m.startswith(policy))
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", color=colour, label=policy)
        for method, mark in MARKS.items():
            if method in found:
                runs = found[method]
                axis.plot(size_of(runs) / 1000, pooled(runs)[0], mark, color="black", label=method, linestyle="none")
        axis.set_title(suite, fontsize=10)
        axis.set_xlabel("kB kept per person")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("right answers")
    unique: dict[str, Any] = {}
    for axis in axes[0]:
        handles, labels = axis.get_legend_handles_labels()
        unique |= dict(zip(labels, handles, strict=True))
    axes[0][0].legend(unique.values(), unique.keys(), fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
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
    figure.savefig(path, dpi=110)
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
                "`python benchmarks/training_free.py`, values and phrasings of validation.",
                "",
            ]
            lines += [f"![recall against bytes](training-free-{model}.png)", "", *recall_table(recall)]
            lines += ["", "Held against what is promised:", "", *comparisons(recall)]
            plot_recall(recall, folder / f"training-free-{model}.png")
        if sweep:
            lines += ["", "### What to keep", ""]
            lines += [
                "`python benchmarks/training_free_settings.py`, values and phrasings of training. Nats: how much a",
                "",
            ]
            lines[-1] = "value surprises where it would be right, the less the better."
            lines += ["", *sweep_table(sweep)]
        if life:
            lines += ["", "### A long life", "", f"`python benchmarks/training_free_life.py`: {life['what']}.", ""]
            lines += [f"![a long life](training-free-life-{model}.png)", "", *life_table(life)]
            plot_life(life, folder / f"training-free-life-{model}.png")
        if cost:
            lines += ["", "### Cost", "", "`python benchmarks/training_free_life.py --cost`, one thread.", ""]
            lines += cost_table(cost)
    path = folder / "training_free_results.md"
    scratch = path.with_suffix(".tmp")
    scratch.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    scratch.replace(path)
