"""Writes `docs/senri_results.md` from the JSON files that the benchmarks and examples of Senri leave in `docs`.

    python benchmarks/senri_results.py

What has not been run stands there as not run.
"""

import json
from pathlib import Path
from typing import Any

from senri_hf.files import write_text


DOCS = Path(__file__).parents[1] / "docs"
RULES = ("additive", "delta", "corrected_delta", "gated_delta")
MODEL, NAMES = "smollm2-135m-instruct", "200 unseen names"


def stored(name: str) -> Any:
    """What a file in `docs` says, None where there is none."""
    path = DOCS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def percent(value: float) -> str:
    return f"{100 * value:.0f}%"


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def recall_section(found: dict[str, Any]) -> list[str]:
    lines = ["One head of 64, 32 of them tried, no training; `python benchmarks/compressive.py`."]
    for title, name in (("By key for the value:", "recall"), ("By value for the key:", "recall backward")):
        pairs = list(found[name]["delta"])
        rows = [[f"`{rule}`", *(percent(found[name][rule][n]) for n in pairs)] for rule in RULES]
        lines += ["", title, "", *table(["rule", *(f"{n} pairs" for n in pairs)], rows)]
    return lines


def speed_section(found: dict[str, Any]) -> list[str]:
    lines = [
        "Processor milliseconds of one thread for 4,096 tokens of one row, and by how much faster that is than the",
        "reference, which takes one head after another, token by token; the same command, in the same run.",
    ]
    for shape, seconds in found["seconds"].items():
        heads, size = shape.split(" x ")
        rows = []
        for rule in (rule for rule in RULES if rule in seconds):
            of = seconds[rule]
            cells = [f"`{rule}`"]
            for form in ("forward", "forward and backward"):
                chunks = of[f"chunks, {form}"]
                reference = of.get(f"reference, {form}")
                cells += [f"{1e3 * chunks:.1f}", "not run" if reference is None else f"{reference / chunks:.0f}"]
            rows.append(cells)
        theirs = [f"{1e3 * seconds['gated_delta'][f'transformers, {form}']:.1f}" for form in
                  ("forward", "forward and backward")]  # fmt: skip
        rows.append(["transformers' `torch_chunk_gated_delta_rule`", theirs[0], "", theirs[1], ""])
        head = ["rule", "forward", "times as fast", "forward and backward", "times as fast"]
        lines += ["", f"{'1 head' if heads == '1' else f'{heads} heads'} of {size}:", "", *table(head, rows)]
    return lines


def associative_section(found: dict[str, Any]) -> list[str]:
    rows = []
    for key, of in found.items():
        model, pairs, *training, seed = key.split(" | ")
        rows.append([model, pairs, ", ".join(training), seed, f"{of['accuracy']:.3f}", f"{of['bytes of state']:,}"])
    lines = [
        "Two layers of width 64, one of attention and the one that is named; every pair is told and then asked for."
    ]
    lines += [
        "`python benchmarks/associative_recall.py`; models, seeds and numbers of pairs that are not here were not run."
    ]
    return [*lines, "", *table(["model", "told", "training", "seed", "accuracy", "bytes of state"], rows)]


def cost_section(found: dict[str, Any]) -> list[str]:
    lengths = sorted({int(n) for of in found.values() for n in of})
    lines = ["Four layers of width 256; text is read in pieces of 2,048 tokens. `python benchmarks/senri_cost.py`."]
    for name in ("prefill, microseconds a token", "decoding, milliseconds a token", "bytes of state",
                 "peak of memory grew by, MB"):  # fmt: skip
        rows = [
            [model, *(number(of[str(n)][name]) if str(n) in of else "not run" for n in lengths)]
            for model, of in found.items()
        ]
        lines += ["", f"{name[0].upper()}{name[1:]}:", "", *table(["model", *(f"{n:,} tokens" for n in lengths)], rows)]
    return lines


def passkey_section(found: dict[str, Any]) -> list[str]:
    lines = [
        "Memory layers only, `gated_delta`, trained on texts of up to 2,048 tokens. Longer ones are read in pieces of",
        "1,024 tokens, between which the context is cleared. Keys that are right, all five digits, by where in the",
        "text they were told (0: at its beginning; 0.25: across the end of a piece); beside them digits that are",
        "right, and digits where memory is reset with the context.",
        "`python benchmarks/passkey.py`.",
    ]
    for name, run in found.items():
        training = run["training"]
        lines += [
            "",
            f"{name[0].upper()}{name[1:]}: {training['parameters']:,} parameters, the loss at the end "
            f"{list(training['loss by step'].values())[-1]:.2g}.",
            "",
        ]
        depths = list(next(iter(run["carried"].values()))["right"])
        rows = []
        for length, of in run["carried"].items():
            reset = run["reset"].get(length)
            rows.append(
                [
                    f"{int(length):,}",
                    *(percent(of["right"][depth]) for depth in depths),
                    percent(of["digits"]),
                    "not run" if reset is None else percent(reset["digits"]),
                    str(of["texts of a depth"]),
                    ", ".join(f"{size:,}" for size in of["bytes of memory of a row"]),
                    f"{of['seconds']:.0f}",
                ]
            )
        head = ["tokens", *(f"told at {depth}" for depth in depths), "digits", "digits, memory reset",
                "texts of a depth", "bytes of memory", "seconds"]  # fmt: skip
        lines += table(head, rows)
    return [*lines, "", "![right keys by length and depth](passkey.png)"]


COMPRESSIVE = (
    "python examples/name_recall/train.py --mechanism compressive --task names --memory-layers 11,14,17,20,23,26 "
    "--lr 1e-3 --min-lr-ratio 0.1 --warmup-steps 10 --batch-size 8 --grad-accum 1 --keep-every 0 --prose-every 0 "
    "--num-train 2560 --epochs 1"
)


def adapter_section(compressive: dict[str, Any], episodic: dict[str, Any] | None) -> list[str]:
    rows = []
    for name, found in (("compressive", compressive), ("episodic, as shipped", episodic)):
        of = ((found or {}).get(MODEL) or {}).get(NAMES, {}).get("memory")
        if of is None:
            rows.append([name, "not run", "", "", ""])
            continue
        told = of["told"]
        rows.append(
            [
                name,
                percent(of["exact"]),
                f"{of['bytes']:,.0f}",
                f"{1e3 * of['seconds']:.0f}",
                f"{1e3 * told['seconds'] / told['tokens']:.1f}",
            ]
        )
    head = ["adapter", "right", "bytes of a person", "milliseconds of an answer", "milliseconds a token told"]
    return [
        f"{NAMES[0].upper()}{NAMES[1:]}, told in one process and asked in another; the two were timed in different",
        f"runs. The compressive one was trained by `{COMPRESSIVE}`.",
        "",
        *table(head, rows),
    ]


def japanese_section(found: dict[str, Any]) -> list[str]:
    rows, samples = [], []
    for name, of in found.items():
        scores = of["perplexity"]
        carried = f"{scores['carried memory']:.1f}" if "carried memory" in scores else ""
        rows.append([name, f"{of['parameters']:,}", f"{of['tokens']:,}", f"{scores['empty memory']:.1f}", carried])
        for prompt, text in of["samples"].items():
            said = " ".join(text.split()).replace("|", "\\|")
            samples.append([name, prompt, said])
    head = ["model", "parameters", "tokens of training", "perplexity, empty memory", "carried memory"]
    lines = ["A chapter of the Debian Reference that was held out; `python examples/senri_japanese/pretrain.py`.", ""]
    return [*lines, *table(head, rows), "", *table(["model", "prompt", "what it says"], samples)]


def reversal_section(found: dict[str, Any]) -> list[str]:
    lines = ["Perplexity of the answer, and how often it is right; `python examples/reversal_curse/experiment.py`."]
    for run, results in found.items():
        rows = []
        for name, of in results.items():
            if "forward" in of:
                both = [f"{of[way]['perplexity']:.2f}, {percent(of[way]['right'])}" for way in ("forward", "backward")]
                rows.append([name, *both, f"{of['reversal gap']:.1f}"])
            else:
                rows.append([name, "", f"{percent(of['right'])}, by guessing {percent(of['by guessing'])}", ""])
        lines += ["", f"{run[0].upper()}{run[1:]}:", "", *table(["", "forward", "backward", "gap"], rows)]
    return lines


def render() -> list[str]:
    """The lines of the page."""
    lines = ["# Senri: results", "", "Written by `python benchmarks/senri_results.py` from the JSON files beside it."]
    compressive = stored("compressive")
    for title, found, section in (
        ("Recall of random pairs", compressive, recall_section),
        ("Speed of the update rules", compressive, speed_section),
        ("Associative recall, trained", stored("associative_recall"), associative_section),
        ("A passkey in noise", stored("passkey"), passkey_section),
        ("Cost by length", stored("senri_cost"), cost_section),
        ("Name recall by adapters of SmolLM2-135M", stored("recall_compressive"),
         lambda found: adapter_section(found, stored("recall"))),
        ("Japanese", stored("senri_japanese"), japanese_section),
        ("Reversal", stored("reversal_curse"), reversal_section),
    ):  # fmt: skip
        lines += ["", f"## {title}", "", *(["Not run yet."] if found is None else section(found))]
    return lines


if __name__ == "__main__":
    write_text(DOCS / "senri_results.md", "\n".join(render()) + "\n")
