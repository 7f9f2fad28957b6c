"""Runs the cyclic examples and an autoencoder of a language model's layer, and writes `docs/symbolic_results.md`.

    python benchmarks/symbolic.py

What has its result in `docs/symbolic.json` already is not run again; `--only` runs some parts. Folders of models go to
`checkpoints/symbolic`.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parents[1]
DOCS, EXAMPLES, WORK = ROOT / "docs", ROOT / "examples" / "cyclic_sequence", ROOT / "checkpoints" / "symbolic"
STORE = DOCS / "symbolic.json"
SEEDS = (0, 1, 2)
PARTS = ("cyclic", "language_model")
LANGUAGE_MODEL = ["--model", "smollm2-135m-instruct", "--dtype", "bfloat16"]
LANGUAGE_MODEL_TRAINING = ["--module", "model.layers.12", "--expansion-factor", "4", "--k", "32", "--steps", "500"]
LANGUAGE_MODEL_TRAINING += ["--reuse", "8", "--buffer-size", "230000", "--save-every", "125", "--resume"]
FIGURES = {
    "train": ("training.png", "attention.png"),
    "sae": ("density.png", "cycle.png"),
    "edit": ("dose_response.png",),
}


def run(*command: str) -> None:
    subprocess.run([sys.executable, *command], check=True, cwd=ROOT)


def cyclic(seed: int) -> dict[str, Any]:
    """The four examples, one after another, with one seed."""
    folders = {name: WORK / f"{name}-{seed}" for name in ("train", "sae", "edit", "check")}
    model, sae = ["--model", str(folders["train"])], ["--sae", str(folders["sae"])]
    commands = {
        "train": ["train_cyclic.py", "--seed", str(seed)],
        "sae": ["train_sae.py", "--seed", str(seed), *model],
        "edit": ["sae_mechanistic_intervention.py", "--seed", str(seed), *model, *sae],
        "check": ["check_hallucinations.py", "--seed", str(seed), *model],
    }
    found = {}
    for name, (script, *arguments) in commands.items():
        path = folders[name] / "results.json"
        if not path.exists():
            run(str(EXAMPLES / script), *arguments, "--output", str(folders[name]))
        found[name] = json.loads(path.read_text())
        for figure in FIGURES.get(name, ()) if seed == SEEDS[0] else ():
            shutil.copy(folders[name] / figure, DOCS / f"symbolic-{name}-{figure}")
    return found


def language_model() -> dict[str, Any]:
    """An autoencoder of a layer of SmolLM2-135M on real text."""
    folder = WORK / "smollm2"
    command = ["-m", "senri_hf.commands.main", "sae"]
    if not (folder / "training.json").exists():
        run(*command, "train", *LANGUAGE_MODEL, *LANGUAGE_MODEL_TRAINING, "--output", str(folder))
    run(*command, "evaluate", str(folder), *LANGUAGE_MODEL, "--output", str(folder / "found.json"))
    run(*command, "contexts", str(folder), *LANGUAGE_MODEL, "--output", str(folder / "contexts.json"))
    measured = json.loads((folder / "found.json").read_text())
    measured.pop("density")
    return {"measured": measured, "contexts": json.loads((folder / "contexts.json").read_text())}


def render(found: dict[str, Any]) -> list[str]:
    lines = ["# Symbols, sparse autoencoders, interventions: results", ""]
    lines += [
        "Written by `python benchmarks/symbolic.py` from `symbolic.json`; the commands are those of the examples."
    ]
    runs: dict[str, Any] = found.get("cyclic", {})
    lines += ["", "## The cyclic sequence", ""]
    if not runs:
        lines += ["Not run yet."]
    else:
        lines += cyclic_tables(runs)
    lines += ["", "## A layer of SmolLM2-135M, on real text", ""]
    if "language_model" not in found:
        return [*lines, "Not run yet."]
    lines += ["| | |", "|---|---|"]
    for name, value in found["language_model"]["measured"].items():
        lines.append(f"| {name.replace('_', ' ')} | {value:,.4g} |")
    lines += ["", "Where some latents are most active:", "", "| latent | active at | contexts |", "|---|---|---|"]
    for entry in found["language_model"]["contexts"]:
        shown = [f"{c['before']}**{c['token'].strip()}**{c['after']}" for c in entry["contexts"][:3]]
        text = " … ".join(" ".join(part.split()) for part in shown).replace("|", "\\|")
        lines.append(f"| {entry['latent']} | {100 * entry['density']:.2f}% | {text} |")
    return lines


def cyclic_tables(runs: dict[str, Any]) -> list[str]:
    def row(name: str, value: Any, form: str = "{:.4g}") -> str:
        return f"| {name} | " + " | ".join(form.format(value(found)) for found in runs.values()) + " |"

    lines = ["| | " + " | ".join(f"seed {seed}" for seed in runs) + " |", "|---|" + "---|" * len(runs)]
    lines += [row("loss above the Bayes floor, nats per symbol", lambda f: f["train"]["above_floor"], "{:.5f}")]
    lines += [row("phases with the right next symbol, of 18", lambda f: f["train"]["phases_right"])]
    first = next(iter(runs.values()))
    for kind in first["check"]:
        lines.append(row(f"back in the cycle: {kind}", lambda f, kind=kind: f["check"][kind]["returned"], "{:.1%}"))
        lines.append(
            row(
                f"forbidden steps per symbol: {kind}",
                lambda f, kind=kind: f["check"][kind]["forbidden_per_symbol"],
                "{:.5f}",
            )
        )
    for where, name in (("windows", "the windows"), ("unseen", "unseen contexts")):
        for key, what in (
            ("explained_variance", "explained variance"),
            ("l0", "L0"),
            ("dead", "never active"),
            ("kl_recovered", "divergence recovered"),
        ):
            lines.append(row(f"autoencoder, {name}: {what}", lambda f, w=where, k=key: f["sae"][w][k]))
    lines.append(row("phases that the best latent flips", lambda f: f["edit"]["best_flip_rate"], "{:.1%}"))
    lines.append(row("the same, mean of all latents", lambda f: f["edit"]["mean_flip_rate"], "{:.1%}"))
    for what, of in (("mean", lambda flips: sum(flips) / len(flips)), ("most", max)):
        name = f"random latents at the dose at which the best flips most: {what}"
        lines.append(row(name, lambda f, of=of: of(controls(f["edit"]["dose_response"])), "{:.1%}"))
    figures = [(name, figure) for name, names in FIGURES.items() for figure in names]
    lines += ["", "Figures of seed 0:", ""]
    return lines + [f"![{name} {figure}](symbolic-{name}-{figure})" for name, figure in figures]


def controls(response: dict[str, Any]) -> list[float]:
    """What the random controls of the best latent do at the dose, the lowest, at which it does most."""
    best = next(iter(response["groups"].values()))
    dose = best["values"].index(max(best["values"]))
    return [line[dose] for line in best["controls"]]


def store(found: dict[str, Any]) -> None:
    for path, text in (
        (STORE, json.dumps(found, indent=1, ensure_ascii=False) + "\n"),
        (DOCS / "symbolic_results.md", "\n".join(render(found)) + "\n"),
    ):
        scratch = path.with_suffix(".tmp")
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    args = parser.parse_args()
    found: dict[str, Any] = json.loads(STORE.read_text()) if STORE.exists() else {}
    if "cyclic" in args.only:
        for seed in args.seeds:
            runs = found.setdefault("cyclic", {})
            if str(seed) not in runs:
                runs[str(seed)] = cyclic(seed)
                store(found)
    if "language_model" in args.only and "language_model" not in found:
        found["language_model"] = language_model()
    store(found)
    print(DOCS / "symbolic_results.md")


if __name__ == "__main__":
    main()
