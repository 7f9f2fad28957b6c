"""Runs every benchmark and writes `docs/results.md` from what they found.

    make results

A benchmark that has its result for the shipped adapter already is not run again, unless it is named with `--again`.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from adapter_digest import adapter_digest
from recall import METHODS, SUITES

from senri_hf.commands.chat import shipped_adapter
from senri_hf.files import write_json, write_text


HERE, DOCS = Path(__file__).parent, Path(__file__).parents[1] / "docs"
MODELS = ("smollm2-135m-instruct", "gemma-3-270m")
TARGETS = {"smollm2-135m-instruct": "demo", "gemma-3-270m": "gemma"}
BENCHMARKS = ("recall", "perplexity", "forgetting", "speed")


def stored(name: str, model: str) -> Any:
    """What a benchmark found for a model, None where it has not run."""
    if name == "forgetting":
        path = DOCS / f"forgetting-{model}.json"
        return json.loads(path.read_text()) if path.exists() else None
    path = DOCS / f"{name}.json"
    return json.loads(path.read_text()).get(model) if path.exists() else None


def discard(name: str, model: str) -> None:
    """Drop what a benchmark found for a model."""
    path = DOCS / (f"forgetting-{model}.json" if name == "forgetting" else f"{name}.json")
    if name == "forgetting":
        path.unlink(missing_ok=True)
    elif path.exists():
        found = json.loads(path.read_text())
        found.pop(model, None)
        write_json(path, found)


def adapter_of(name: str, model: str) -> str | None:
    """The digest of the adapter with which a benchmark ran last."""
    found = stored(name, model) or {}
    digest: str | None = found.get("setting", found).get("adapter")
    return digest


def run(name: str, model: str, adapter: Path) -> None:
    output = DOCS if name == "forgetting" else DOCS / f"{name}.json"
    command = [
        sys.executable,
        str(HERE / f"{name}.py"),
        "--model",
        model,
        "--adapter",
        str(adapter),
        "--output",
        str(output),
    ]
    if name in ("recall", "forgetting"):  # many answers: the base model in bfloat16
        command += ["--dtype", "bfloat16"]
    subprocess.run(command, check=True)


def percent(value: float) -> str:
    return f"{100 * value:.0f}%"


def size(value: float) -> str:
    return f"{value / 1e6:.1f} MB" if value >= 1e5 else f"{value / 1e3:.1f} kB"


def suites(found: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The suites that were run, in order; one that was begun and interrupted has nothing."""
    return [(suite, found[suite]) for suite in SUITES if found.get(suite)]


def recall_table(found: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["| told | episodes | " + " | ".join(METHODS) + " |", "|---|---|" + "---|" * len(METHODS)]
    for suite, results in suites(found):
        cells = []
        for method in METHODS:
            r = results.get(method)
            cells.append(
                "not run"
                if r is None
                else f"**{percent(r['exact'])}** · {size(r['bytes'])} · {r['seconds'] * 1e3:.0f} ms"
            )
        count = next(iter(results.values()))["episodes"]
        lines.append(f"| {suite} | {count} | " + " | ".join(cells) + " |")
    return lines


def wrong_answers(found: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["| told | asked | right | said |", "|---|---|---|---|"]
    for suite, results in suites(found):
        for question, answer, reply in results.get("memory", {}).get("wrong", [])[:2]:
            said = " ".join(reply.split())[:120].replace("|", "\\|")
            lines.append(f"| {suite} | {question} | {answer} | {said} |")
    return lines


def gate_tables(kept: dict[str, list[dict[str, Any]]]) -> list[str]:
    """For every kind of surprise told conversations with the tokens that most layers kept in bold."""
    return [line for title, rows in kept.items() for line in ("", f"{title.capitalize()}:", "", *gate_table(rows))]


def gate_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| value told | kept | their surprise, mean | that of those dropped | tokens; those in bold were kept by at "
        "least half of the layers |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        words = [word.replace("\n", "⏎").replace("|", "\\|") for word, _ in row["tokens"]]
        shown = [
            f"**{w.strip() or '·'}**" if share >= 0.5 else w.strip()
            for w, (_, share) in zip(words, row["tokens"], strict=True)
        ]
        surprise = f"{row['surprise']:.2f} | {row['dropped_surprise']:.2f}"
        lines.append(f"| {row['answer']} | {percent(row['kept'])} | {surprise} | {' '.join(shown)} |")
    return lines


def forgetting_section(found: dict[str, Any], model: str) -> list[str]:
    """Recall against decay cycles: what the buffer held is forgotten, what the store took is not."""
    cycles = found["cycles"]
    lines = ["", "### Forgetting", "", f"![recall against decay cycles](forgetting-{model}.png)", ""]
    lines += [
        "Four facts, one asked, after so many decay cycles. Only what the buffer alone holds fades, until it is too"
    ]
    lines += ["weak to be read; what the store took stays until something more important replaces it.", ""]
    lines += ["| memory | " + " | ".join(map(str, cycles)) + " |", "|---|" + "---|" * len(cycles)]
    return lines + [f"| {name} | " + " | ".join(map(percent, exact)) + " |" for name, exact in found["exact"].items()]


def general_section(found: dict[str, Any] | None) -> list[str]:
    """Replies to questions that are not about the user, with a memory full of facts."""
    if found is None:
        return []
    figures = {name: value for name, value in found.items() if name != "replies"}
    lines = ["", "### General questions with a memory full of facts", "", *flat_table(figures)]
    lines += ["", "| asked | without memory | with memory |", "|---|---|---|"]
    for question, *replies in found["replies"][:6]:
        before, after = (" ".join(reply.split())[:120].replace("|", "\\|") for reply in replies)
        lines.append(f"| {question} | {before} | {after} |")
    return lines


def training_section(model: str) -> list[str]:
    """What the shipped adapter's training took, where it is known."""
    adapter = shipped_adapter(model)
    path = adapter / "training_cost.json" if adapter else None
    if path is None or not path.exists():
        return []
    cost = json.loads(path.read_text())
    steps = f"{cost['steps']} optimizer steps, and {cost['topic_steps']} before them that learn topics only"
    took = f"{cost['seconds'] / 60:.0f} minutes with {cost['threads']} threads"
    how = cost.get("how", f"`make train-{TARGETS[model]}` makes one like it")
    return ["", "### Training", "", f"{steps}: {took}. {how[0].upper()}{how[1:]}."]


def initialisation_section(model: str) -> list[str]:
    """What the two initialisations learn in as many steps; of no shipped adapter, so it is run by itself."""
    path = DOCS / "initialisations.json"
    found = json.loads(path.read_text()).get(model) if path.exists() else None
    if found is None:
        return []
    (steps, *_), rows = found["exact"].values(), found["exact"].items()
    lines = ["", "### Where the read starts", "", "`python benchmarks/initialisations.py`: full copies trained on"]
    lines += ["names only; unseen names whose every token comes out on top, by optimizer steps.", ""]
    lines += ["| mechanism, init | " + " | ".join(steps) + " |", "|---|" + "---|" * len(steps)]
    return lines + [f"| {init} | " + " | ".join(map(percent, exact.values())) + " |" for init, exact in rows]


def flat_table(found: dict[str, Any]) -> list[str]:
    lines = ["| | |", "|---|---|"]
    for name, value in found.items():
        lines.append(f"| {name} | {value:,.4g} |" if isinstance(value, float) else f"| {name} | {value} |")
    return lines


def write(path: Path) -> None:
    """Render all that is stored."""
    lines = [
        "# Results",
        "",
        "Written by `make results` from the JSON files beside it.",
        "",
        "Recall is scored on what `generate()` says: the value told has to be in the reply, and no other value of the",
        "episode. Values, phrasings and (where it says so) relations were never seen in training. Told in one process,",
        "saved to a file, asked in another. Beside each share stand the bytes that are kept per person (of the memory,",
        "of the keys and values of a context, of a text) and the time of an answer, in a batch of 25; what was told",
        "before is read outside that time, but for a text, which is read with every question.",
    ]
    for model in MODELS:
        sections = {name: stored(name, model) for name in BENCHMARKS}
        if not any(sections.values()):
            lines += ["", f"## {model}", "", "No adapter is shipped for it yet, so nothing was run."]
            continue
        lines += ["", f"## {model}"]
        if sections["recall"]:
            command = f"python benchmarks/recall.py --model {model} --adapter … --dtype bfloat16"
            lines += ["", "### Recall", "", f"`{command}`. A suite of it that has no row here was not run.", ""]
            digest = sections["recall"]["adapter"]
            lines += [f"The SHA-256 of the adapter's settings and weights begins with `{digest}`.", ""]
            lines += recall_table(sections["recall"])
            lines += ["", "Some answers that were wrong:", "", *wrong_answers(sections["recall"])]
        lines += training_section(model)
        lines += initialisation_section(model)
        if sections["forgetting"]:
            lines += forgetting_section(sections["forgetting"], model)
            lines += ["", "### What the surprise gate kept", *gate_tables(sections["forgetting"]["kept"])]
        if sections["perplexity"]:
            prose = {name: value for name, value in sections["perplexity"].items() if name != "general"}
            lines += ["", "### Perplexity on ordinary English prose", "", *flat_table(prose)]
            lines += general_section(sections["perplexity"].get("general"))
        if sections["speed"]:
            lines += ["", "### Cost"]
            for title, values in sections["speed"].items():
                lines += ["", f"{title[0].upper()}{title[1:]}:", "", *flat_table(values)]
    write_text(path, "\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", nargs="*", default=[], choices=BENCHMARKS, help="run these again")
    args = parser.parse_args()
    for model in MODELS:
        adapter = shipped_adapter(model)
        if adapter is None:
            print(f"{model}: no adapter is shipped")
            continue
        for name in BENCHMARKS:
            if name in args.again:
                discard(name, model)
            # these go on by themselves where they stopped, and drop what another adapter did
            if name in ("recall", "forgetting") or adapter_of(name, model) != adapter_digest(adapter):
                run(name, model, adapter)
            write(DOCS / "results.md")
    print(f"{DOCS / 'results.md'}")


if __name__ == "__main__":
    main()
