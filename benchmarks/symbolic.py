"""Runs the examples of symbols, sparse autoencoders and interventions, and writes `docs/symbolic_results.md`.

    python benchmarks/symbolic.py

What `docs/symbolic.json` has with the same settings is not run again; `--only` runs some parts. The settings of an
example are part of its folder's name in `checkpoints/symbolic`, and so is what it reads of other examples: nothing is
taken for the result of other settings. (Of changed code the folders know nothing: remove them.) The part `saelens`
needs the extra `interop`.
"""

import argparse
import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from symbolic_results import FIGURES, render

from senri_hf.commands.main import build_parser
from senri_hf.files import write_json, write_text


ROOT = Path(__file__).parents[1]
DOCS, EXAMPLES, WORK = ROOT / "docs", ROOT / "examples", Path("checkpoints") / "symbolic"
for _folder in ("cyclic_sequence", "lorenz_sequence", "memory_reads"):
    sys.path.insert(0, str(EXAMPLES / _folder))
ADAPTER = Path("examples") / "name_recall" / "adapters" / "smollm2-135m-instruct"
STORE = DOCS / "symbolic.json"
SEEDS = (0, 1, 2)
# Latents per dimension of autoencoders beside those of the cyclic sequence's own size, with the first seed.
SIZES = (1.0,)
# Modules beside the residual stream after the first layer's attention, with more latents, of the first seed's model.
MODULES = ("model.layers.0",)
MODULES_FACTOR = 0.75
# Transformers beside those of the cyclic sequence, which have one head and an MLP in every layer.
TRANSFORMERS = {"no MLP": ("--no-mlp",), "four heads": ("--num-heads", "4")}
PARTS = ("cyclic", "modules", "sizes", "transformers", "variants", "lorenz", "language_model", "memory")
SEEDED = ("cyclic", "memory")
SAELENS = "saelens"
LANGUAGE_MODEL = ["--model", "smollm2-135m-instruct", "--module", "model.layers.8"]
COMMAND = f"senri-hf sae train {' '.join(LANGUAGE_MODEL)}"


def run(*command: str) -> None:
    subprocess.run([sys.executable, *command], check=True, cwd=ROOT)


class Run:
    """A run of an example.

    Args:
        name: What its folder's name begins with.
        script: The example's module.
        arguments: All but `--output`.
        needs: Runs whose folders it reads.
    """

    def __init__(self, name: str, script: str, *arguments: str, needs: "tuple[Run, ...]" = ()) -> None:
        module = importlib.import_module(script)
        settings_of = getattr(module, "settings_of", None) or importlib.import_module("train_cyclic").settings_of
        self.path, self.arguments, self.needs = Path(str(module.__file__)), arguments, needs
        self.settings = without_output(settings_of(module.parse(arguments)))
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()
        self.folder = WORK / f"{name}-{digest[:10]}"

    def made(self, found: Any) -> bool:
        """Whether something is a result of this run's settings."""
        return isinstance(found, dict) and without_output(found.get("settings", {})) == self.settings

    def result(self) -> dict[str, Any]:
        """What the example writes; it is run when it did not yet, after those that it needs."""
        path = ROOT / self.folder / "results.json"
        if not path.exists():
            for other in self.needs:
                other.result()
            run(str(self.path), *self.arguments, "--output", str(self.folder))
        found: dict[str, Any] = json.loads(path.read_text())
        if not self.made(found):
            raise SystemExit(f"{path} is of other settings than its folder's name: remove {self.folder}")
        return found


def without_output(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in json.loads(json.dumps(settings)).items() if name != "output"}


def cyclic_runs(seed: int) -> dict[str, Run]:
    """The four examples, one after another, with one seed."""
    common = ["--seed", str(seed)]
    train = Run(f"train-{seed}", "train_cyclic", *common)
    model = [*common, "--model", str(train.folder)]
    sae = Run(f"sae-{seed}", "train_sae", *model, needs=(train,))
    edit = [*model, "--sae", str(sae.folder)]
    return {
        "train": train,
        "sae": sae,
        "edit": Run(f"edit-{seed}", "sae_mechanistic_intervention", *edit, needs=(train, sae)),
        "check": Run(f"check-{seed}", "check_hallucinations", *model, needs=(train,)),
    }


def sizes_run(factor: float) -> Run:
    """An autoencoder of another size, on the model of the first seed."""
    train = cyclic_runs(SEEDS[0])["train"]
    arguments = ["--model", str(train.folder), "--expansion-factor", str(factor)]
    return Run(f"sae-{factor}", "train_sae", *arguments, needs=(train,))


def module_runs(module: str) -> dict[str, Run]:
    """An autoencoder of another module of the first seed's model, and what its latents change."""
    train = cyclic_runs(SEEDS[0])["train"]
    of_train = ["--model", str(train.folder)]
    of_module = ["--module", module, "--expansion-factor", str(MODULES_FACTOR)]
    sae = Run(f"sae-{module}", "train_sae", *of_train, *of_module, needs=(train,))
    edit = [*of_train, "--sae", str(sae.folder)]
    return {"sae": sae, "edit": Run(f"edit-{module}", "sae_mechanistic_intervention", *edit, needs=(train, sae))}


def transformer_runs(name: str) -> dict[str, Run]:
    """Another transformer, and an autoencoder of it."""
    short = name.replace(" ", "-")
    train = Run(f"train-{short}", "train_cyclic", *TRANSFORMERS[name])
    return {
        "train": train,
        "sae": Run(f"sae-{short}", "train_sae", "--model", str(train.folder), needs=(train,)),
    }


def variants_run() -> Run:
    """Variants of autoencoders beside each other, on the model of the first seed."""
    train = cyclic_runs(SEEDS[0])["train"]
    return Run("variants", "compare_variants", "--model", str(train.folder), needs=(train,))


def memory_run(seed: int, adapter: Path) -> Run:
    """Autoencoders of what a memory adapter reads, and recall without the latents of a kind of fact."""
    return Run(f"memory-{seed}", "ablate_facts", "--adapter", str(adapter), "--seed", str(seed))


def flat(runs: Any, *place: str) -> Iterator[tuple[tuple[str, ...], Run]]:
    """The runs in a run, or in dicts of runs, with their places."""
    if isinstance(runs, Run):
        yield place, runs
    else:
        for name, of_name in runs.items():
            yield from flat(of_name, *place, name)


def collect(found: dict[str, Any], part: str, runs: Any, seeds: set[str] | None = None) -> None:
    """Put the results of runs into a part: those it has, where they are of the same settings, and new ones.

    Args:
        seeds: First keys of runs of which missing ones are run; all when None.
    """
    kept, missing = found.pop(part, None), []
    for place, of_place in flat(runs, part):
        result = kept
        for name in place[1:]:
            result = result.get(name) if isinstance(result, dict) else None
        if of_place.made(result):
            put(found, place, result)
        elif seeds is None or place[1] in seeds:
            missing.append((place, of_place))
    for place, of_place in missing:
        put(found, place, of_place.result())
        store(found)


def put(found: dict[str, Any], place: tuple[str, ...], result: Any) -> None:
    for name in place[:-1]:
        found = found.setdefault(name, {})
    found[place[-1]] = result


def keep_figures(name: str, folder: Path) -> None:
    """Copy the figures of a run; one whose result was kept may have no folder here."""
    for figure in FIGURES[name]:
        if (ROOT / folder / figure).exists():
            shutil.copy(ROOT / folder / figure, DOCS / f"symbolic-{name}-{figure}")


def memory_figures(found: dict[str, Any]) -> None:
    """Recall in the mean over seeds, by what is ablated and by the dose."""
    ablate_facts = importlib.import_module("ablate_facts")
    *of_splits, doses = FIGURES["memory"]
    first = ablate_facts.TESTED[next(iter(ablate_facts.TESTED))]
    every = [of_seed["tested"][first]["doses"] for of_seed in found.values()]
    ablate_facts.draw_doses(every, DOCS / f"symbolic-memory-{doses}")
    for split, figure in zip(ablate_facts.TESTED, of_splits, strict=True):
        whose = ablate_facts.TESTED[split]
        several = [of_seed["tested"][whose] for of_seed in found.values()]
        kinds = next(iter(found.values()))["settings"]["kinds"]
        ablate_facts.draw(several, kinds, DOCS / f"symbolic-memory-{figure}", whose)


def language_model() -> dict[str, Any]:
    """An autoencoder of a layer of SmolLM2-135M on real text."""
    from senri_hf.interpretability import plots

    folder, command = ROOT / language_model_folder(), ["-m", "senri_hf.commands.main", "sae"]
    if not (folder / "training.json").exists():
        run(*command, "train", *LANGUAGE_MODEL, "--resume", "--output", str(folder))
    for what in ("evaluate", "contexts", "doses"):
        if not (folder / f"{what}.json").exists():
            run(*command, what, str(folder), "--output", str(folder / f"{what}.json"))
    measured, training = (json.loads((folder / f"{name}.json").read_text()) for name in ("evaluate", "training"))
    plots.latent_density({"held-out text": measured.pop("density")}, folder / "density.png")
    keep_figures("smollm2", folder)
    return {
        "command": COMMAND,
        "settings": settings_of_the_command(),
        "measured": measured,
        **{name: training[name] for name in ("seconds", "cpu_seconds")},
        **{name: json.loads((folder / f"{name}.json").read_text()) for name in ("contexts", "doses")},
    }


def settings_of_the_command() -> dict[str, Any]:
    """What the commands that train, measure, show and dose the autoencoder are run with, their defaults included."""
    arguments = {"train": [*LANGUAGE_MODEL, "--output", ""], "evaluate": [""], "contexts": [""], "doses": [""]}
    parsed = {name: vars(build_parser().parse_args(["sae", name, *of_name])) for name, of_name in arguments.items()}
    places = ("run", "sae", "output", "resume")
    return {name: {key: of[key] for key in of if key not in places} for name, of in parsed.items()}


def language_model_folder() -> Path:
    settings = json.dumps(settings_of_the_command(), sort_keys=True)
    return WORK / f"smollm2-{hashlib.sha256(settings.encode()).hexdigest()[:10]}"


def saelens() -> dict[str, Any]:
    """The autoencoder of SmolLM2-135M as sae-lens reads it, on real text: its numbers and ours."""
    import sae_lens
    import torch

    from senri_hf import SparseAutoencoder, load_base
    from senri_hf.interpretability import export_saelens, module_activations, reconstruction_metrics
    from senri_hf.tasks.text import ordinary_text

    folder = ROOT / language_model_folder()
    ours = SparseAutoencoder.from_pretrained(folder).eval()
    theirs = sae_lens.SAE.load_from_disk(export_saelens(ours, folder / "saelens"))
    model, tokenizer = load_base("smollm2-135m-instruct", progress=False)
    ids = tokenizer("\n\n".join(ordinary_text()[:20]), add_special_tokens=False, return_tensors="pt")["input_ids"]
    batches = [{"input_ids": ids[:, :512].view(2, 256)}]
    (x,) = module_activations(model, ours.config.hook_name, batches, skip_positions=ours.config.skip_positions)
    with torch.no_grad():
        latents, reconstruction = theirs.encode(x), theirs(x)
        found = reconstruction_metrics(ours, [x])
        error = (x - reconstruction).double().square().sum() / (x.double() - x.double().mean(0)).square().sum()
        return {
            "settings": settings_of_the_command(),
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
    write_json(STORE, found)
    write_text(DOCS / "symbolic_results.md", "\n".join(render(found)) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=(*PARTS, SAELENS), default=list(PARTS))
    parser.add_argument("--adapter", type=Path, default=ADAPTER, help="whose reads are looked at, in the repository")
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS), help="of the parts cyclic and memory")
    args = parser.parse_args()
    os.chdir(ROOT)  # folders in settings are relative to it
    seeds = sorted({*SEEDS, *args.seeds})
    runs: dict[str, Any] = {
        "cyclic": lambda: {str(seed): cyclic_runs(seed) for seed in seeds},
        "sizes": lambda: {str(factor): sizes_run(factor) for factor in SIZES},
        "modules": lambda: {module: module_runs(module) for module in MODULES},
        "transformers": lambda: {name: transformer_runs(name) for name in TRANSFORMERS},
        "variants": variants_run,
        "lorenz": lambda: Run("lorenz", "train_lorenz"),
        "memory": lambda: {str(seed): memory_run(seed, args.adapter) for seed in seeds},
    }
    of_the_command = {"language_model": language_model, SAELENS: saelens}
    found: dict[str, Any] = json.loads(STORE.read_text()) if STORE.exists() else {}
    for part in args.only:
        if part in runs:
            collect(found, part, runs[part](), set(map(str, args.seeds)) if part in SEEDED else None)
        elif found.get(part, {}).get("settings") != settings_of_the_command():
            found[part] = of_the_command[part]()
            store(found)
    first = cyclic_runs(SEEDS[0])
    for name in ("train", "sae", "edit"):
        keep_figures(name, first[name].folder)
    keep_figures("variants", variants_run().folder)
    keep_figures("lorenz", Run("lorenz", "train_lorenz").folder)
    if "memory" in found:
        memory_figures(found["memory"])
    store(found)
    print(DOCS / "symbolic_results.md")


if __name__ == "__main__":
    main()
