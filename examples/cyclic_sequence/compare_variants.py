"""Compare the variants of sparse autoencoders: how much each explains of a module, with how many latents active.

    python examples/cyclic_sequence/compare_variants.py

Every variant is trained a few times on a module of the transformer that `train_cyclic.py` trained, for other numbers
of active latents or other penalties, and measured on contexts that training never saw, and on the windows.

Writes `results.json` and a figure into `--output`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train_cyclic import write_results
from train_sae import add_training, judged_contexts, task_of, trained, training_activations
from transformers import AutoModelForCausalLM, set_seed

from senri_hf.configuration.sparse_autoencoder import VARIANTS
from senri_hf.interpretability import plots, reconstruction_metrics


COUNTS = ("topk", "batchtopk")  # variants that are told how many latents are active; others have a penalty


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The settings of a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_training(parser, steps=1000)
    add = parser.add_argument
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    add("--k", nargs="+", type=int, default=[2, 4, 8], help="for topk and batchtopk")
    add("--sparsity-coefficients", nargs="+", type=float, default=[0.1, 0.4, 1.6], help="for the others")
    add("--output", type=Path, default=Path("checkpoints/cyclic-variants"))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    task, settings = task_of(args.model)
    module = args.module
    activations = training_activations(model, module, task, settings, args.contexts)
    sorts = judged_contexts(task, settings)
    found: dict[str, list[dict[str, Any]]] = {}
    for variant in args.variants:
        name = "k" if variant in COUNTS else "sparsity_coefficient"
        for value in args.k if variant in COUNTS else args.sparsity_coefficients:
            set_seed(args.seed)
            config = {"variant": variant, "expansion_factor": args.expansion_factor, name: value}
            sae, _ = trained(module, activations, args, **config)
            entry: dict[str, Any] = {name: value}
            for sort, of_sort in sorts.items():
                measured = reconstruction_metrics(sae, [of_sort.activations(model, module)])
                entry[sort] = {key: measured[key] for key in ("l0", "explained_variance", "dead")}
            found.setdefault(variant, []).append(entry)
            print(variant, entry, flush=True)
    write_results(args, {"variants": found})
    points = {
        variant: [(entry["unseen"]["l0"], entry["unseen"]["explained_variance"]) for entry in entries]
        for variant, entries in found.items()
    }
    plots.sparsity_frontier(points, args.output / "frontier.png")
    print(f"{args.output}")


if __name__ == "__main__":
    main()
