"""Runs the examples of symbols, sparse autoencoders and interventions, and writes `docs/symbolic_results.md`.

    python benchmarks/symbolic.py

What has its result in `docs/symbolic.json` already is not run again; `--only` runs some parts. Folders of models go to
`checkpoints/symbolic`. The part `saelens` needs sae-lens, which has requirements of its own: run it with the Python of
an environment that has both.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from symbolic_results import FIGURES, render


ROOT = Path(__file__).parents[1]
DOCS, EXAMPLES, WORK = ROOT / "docs", ROOT / "examples", ROOT / "checkpoints" / "symbolic"
CYCLIC, LORENZ = EXAMPLES / "cyclic_sequence", EXAMPLES / "lorenz_sequence" / "train_lorenz.py"
READS = EXAMPLES / "memory_reads" / "ablate_facts.py"
ADAPTER = EXAMPLES / "name_recall" / "adapters" / "smollm2-135m-instruct"
STORE = DOCS / "symbolic.json"
SEEDS = (0, 1, 2)
PARTS = ("cyclic", "variants", "lorenz", "language_model", "memory")
SAELENS = "saelens"
LANGUAGE_MODEL = ["--model", "smollm2-135m-instruct"]
LANGUAGE_MODEL_TRAINING = ["--module", "model.layers.8", "--expansion-factor", "4", "--k", "32", "--steps", "500"]
LANGUAGE_MODEL_TRAINING += ["--batch-size", "1024", "--reuse", "7", "--buffer-size", "80000", "--save-every", "250"]


def run(*command: str) -> None:
    subprocess.run([sys.executable, *command], check=True, cwd=ROOT)


def result_of(folder: Path, script: Path, *arguments: str) -> dict[str, Any]:
    """What an example wrote into a folder; it is run when it did not."""
    path = folder / "results.json"
    if not path.exists():
        run(str(script), *arguments, "--output", str(folder.relative_to(ROOT)))
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def keep_figures(name: str, folder: Path) -> None:
    for figure in FIGURES[name]:
        shutil.copy(folder / figure, DOCS / f"symbolic-{name}-{figure}")


def cyclic(seed: int) -> dict[str, Any]:
    """The four examples, one after another, with one seed."""
    folders = {name: WORK / f"{name}-{seed}" for name in ("train", "sae", "edit", "check")}
    model, sae = (
        ["--" + option, str(folders[name].relative_to(ROOT))] for option, name in (("model", "train"), ("sae", "sae"))
    )
    common = ["--seed", str(seed)]
    found = {
        "train": result_of(folders["train"], CYCLIC / "train_cyclic.py", *common),
        "sae": result_of(folders["sae"], CYCLIC / "train_sae.py", *common, *model),
        "edit": result_of(folders["edit"], CYCLIC / "sae_mechanistic_intervention.py", *common, *model, *sae),
        "check": result_of(folders["check"], CYCLIC / "check_hallucinations.py", *common, *model),
    }
    if seed == SEEDS[0]:
        for name in ("train", "sae", "edit"):
            keep_figures(name, folders[name])
    return found


def variants() -> dict[str, Any]:
    """Variants of autoencoders beside each other, on the model of the first seed."""
    model = (WORK / f"train-{SEEDS[0]}").relative_to(ROOT)
    found = result_of(WORK / "variants", CYCLIC / "compare_variants.py", "--model", str(model))
    keep_figures("variants", WORK / "variants")
    return found


def lorenz() -> dict[str, Any]:
    """The transformer on the Lorenz system in symbols."""
    found = result_of(WORK / "lorenz", LORENZ)
    keep_figures("lorenz", WORK / "lorenz")
    return found


def language_model() -> dict[str, Any]:
    """An autoencoder of a layer of SmolLM2-135M on real text."""
    from senri_hf.interpretability import plots

    folder = WORK / "smollm2"
    command = ["-m", "senri_hf.commands.main", "sae"]
    if not (folder / "training.json").exists():
        run(*command, "train", *LANGUAGE_MODEL, *LANGUAGE_MODEL_TRAINING, "--resume", "--output", str(folder))
    for what, extra in (("evaluate", ["--pieces", "16"]), ("contexts", ["--pieces", "120"])):
        if not (folder / f"{what}.json").exists():
            run(*command, what, str(folder), *LANGUAGE_MODEL, *extra, "--output", str(folder / f"{what}.json"))
    measured, training = (json.loads((folder / f"{name}.json").read_text()) for name in ("evaluate", "training"))
    plots.latent_density({"held-out text": measured.pop("density")}, folder / "density.png")
    keep_figures("smollm2", folder)
    seconds = {name: training[name] for name in ("seconds", "cpu_seconds")}
    command_line = f"senri-hf sae train {' '.join(LANGUAGE_MODEL + LANGUAGE_MODEL_TRAINING)}"
    return {
        "command": command_line,
        "measured": measured,
        **seconds,
        "contexts": json.loads((folder / "contexts.json").read_text()),
    }


def memory(adapter: Path) -> dict[str, Any]:
    """Autoencoders of what a memory adapter reads, and recall without the latents of a kind of fact."""
    found = result_of(WORK / "memory", READS, "--adapter", os.path.relpath(adapter, ROOT))
    keep_figures("memory", WORK / "memory")
    return found


def saelens() -> dict[str, Any]:
    """The autoencoder of SmolLM2-135M as sae-lens reads it, on real text: its numbers and ours."""
    import sae_lens
    import torch

    from senri_hf import SparseAutoencoder, load_base
    from senri_hf.interpretability import export_saelens, module_activations, reconstruction_metrics
    from senri_hf.tasks.text import ordinary_text

    ours = SparseAutoencoder.from_pretrained(WORK / "smollm2").eval()
    theirs = sae_lens.SAE.load_from_disk(export_saelens(ours, WORK / "smollm2-saelens"))
    model, tokenizer = load_base("smollm2-135m-instruct", progress=False)
    ids = tokenizer("\n\n".join(ordinary_text()[:20]), add_special_tokens=False, return_tensors="pt")["input_ids"]
    batches = [{"input_ids": ids[:, :512].view(2, 256)}]
    (x,) = module_activations(model, ours.config.hook_name, batches, skip_positions=ours.config.skip_positions)
    with torch.no_grad():
        latents, reconstruction = theirs.encode(x), theirs(x)
        found = reconstruction_metrics(ours, [x])
        error = (x - reconstruction).double().square().sum() / (x.double() - x.double().mean(0)).square().sum()
        return {
            "version": sae_lens.__version__,
            "architecture": theirs.cfg.architecture(),
            "hook_name": theirs.cfg.metadata.hook_name,
            "activations": len(x),
            "l0": {"ours": found["l0"], "theirs": float((latents > 0).sum() / len(x))},
            "explained_variance": {"ours": found["explained_variance"], "theirs": float(1 - error)},
            "furthest_latent": float((latents - ours.encode(x)).abs().max()),
            "furthest_reconstruction": float((reconstruction - ours(x).reconstruction).abs().max()),
            "largest_latent": float(latents.max()),
        }


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
    parser.add_argument("--only", nargs="*", choices=(*PARTS, SAELENS), default=list(PARTS))
    parser.add_argument("--adapter", type=Path, default=ADAPTER, help="memory adapter whose reads are looked at")
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    args = parser.parse_args()
    parts = {
        "variants": variants,
        "lorenz": lorenz,
        "language_model": language_model,
        SAELENS: saelens,
        "memory": lambda: memory(args.adapter),
    }
    found: dict[str, Any] = json.loads(STORE.read_text()) if STORE.exists() else {}
    for part in args.only:
        if part == "cyclic":
            runs = found.setdefault("cyclic", {})
            for seed in args.seeds:
                if str(seed) not in runs:
                    runs[str(seed)] = cyclic(seed)
                    store(found)
        elif part not in found:
            found[part] = parts[part]()
            store(found)
    store(found)
    print(DOCS / "symbolic_results.md")


if __name__ == "__main__":
    main()
