"""Train a sparse autoencoder on a module of the transformer that `train_cyclic.py` trained.

    python examples/cyclic_sequence/train_sae.py

The module is by default the residual stream after the first layer's attention, which counts the symbols, and before its
MLP. The autoencoder is trained on the activations of all windows of the sequence, and of contexts with wrong symbols;
with `--contexts windows` on those of the windows alone. It is measured on contexts with wrong symbols that neither the
transformer nor the autoencoder ever saw, and on the windows, of which there are no others than those trained on.
Activations at a symbol are of what comes before it, too: of a context that is new as a whole, only those count from
which on nothing that was trained on begins with the same symbols.

Writes the autoencoder, `results.json` and figures into `--output`.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from train_cyclic import contexts, write_results
from transformers import AutoModelForCausalLM, set_seed

from senri_hf import SparseAutoencoder, SparseAutoencoderConfig
from senri_hf.configuration.sparse_autoencoder import VARIANTS
from senri_hf.interpretability import (
    ActivationStream,
    SparseAutoencoderTrainer,
    SparseAutoencoderTrainingArguments,
    module_activations,
    plots,
    prediction_metrics,
    reconstruction_metrics,
)
from senri_hf.tasks import CyclicSequence


ROWS = 90
SORTS = ("both", "windows")
# Wrong symbols in the contexts that an autoencoder is trained on, and measured on.
WRONG = (1, 2)
# The share of the activations to train on that are of the windows.
WINDOWS = 0.2
# Steps after which a latent is dead that was not active in any.
DEAD_AFTER = 200
# The explained variance that is aimed at.
EXPLAINED = 0.998


def task_of(model_folder: Path) -> tuple[CyclicSequence, dict[str, Any]]:
    """The sequence that a model was trained on, and the settings of that training."""
    settings = json.loads((model_folder / "results.json").read_text())["settings"]
    return CyclicSequence(settings["symbols"], settings["hold"]), settings


def batches(rows: list[list[int]]) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": torch.tensor(rows[start : start + ROWS])} for start in range(0, len(rows), ROWS)]


def rows_of(task: CyclicSequence, settings: dict[str, Any]) -> list[list[int]]:
    """Contexts with `WRONG` symbols to train on; the transformer was, too."""
    training = contexts(task, settings["block"], settings["held_out"])[0]
    return [context for wrong in WRONG for context, _ in training[wrong]]


def unseen_rows(task: CyclicSequence, settings: dict[str, Any]) -> list[list[int]]:
    """Contexts with as many wrong symbols that neither the transformer nor an autoencoder is trained on."""
    testing = contexts(task, settings["block"], settings["held_out"])[1]
    return [context for wrong in WRONG for context in testing[wrong]]


def known_rows(task: CyclicSequence, settings: dict[str, Any]) -> list[list[int]]:
    """All contexts that the transformer was trained on: those of an autoencoder are among them."""
    training = contexts(task, settings["block"], settings["held_out"])[0]
    windows = task.windows(settings["block"])
    return windows + [context for of_wrong in training.values() for context, _ in of_wrong]


def beginnings(rows: list[list[int]]) -> set[tuple[int, ...]]:
    """All that contexts begin with."""
    return {tuple(row[:end]) for row in rows for end in range(1, len(row) + 1)}


class Judged:
    """Contexts and the symbols in them whose activations are measured.

    Args:
        rows: Contexts.
        known: What they may begin with that does not count; each other beginning counts once.
    """

    def __init__(self, rows: list[list[int]], known: set[tuple[int, ...]] = frozenset()) -> None:
        seen, self.rows, self.new = set(known), rows, torch.zeros(len(rows), len(rows[0]), dtype=torch.bool)
        for index, row in enumerate(rows):
            for end in range(1, len(row) + 1):
                self.new[index, end - 1] = tuple(row[:end]) not in seen
            seen |= beginnings([row])

    def activations(self, model: Any, module: str) -> torch.Tensor:
        """[n, d_in] of the symbols that count."""
        return torch.cat(list(module_activations(model, module, batches(self.rows))))[self.new.flatten()]

    def extent(self, model: Any, module: str) -> dict[str, int]:
        """How many activations count, and how many principal components hold `EXPLAINED` of their variance."""
        x = self.activations(model, module).double()
        variances = torch.linalg.svdvals(x - x.mean(0)).square()
        held = variances.cumsum(0) / variances.sum()
        return {"different": len(x), "components": int((held < EXPLAINED).sum()) + 1}

    def measure(self, model: Any, module: str, sae: Any) -> dict[str, Any]:
        """What is explained of them, and of what the model predicts after them."""
        places = iter(self.new.split(ROWS))
        found = reconstruction_metrics(sae, [self.activations(model, module)])
        found |= prediction_metrics(model, module, sae, batches(self.rows), positions=lambda _: next(places))
        found["density"] = found["density"].tolist()
        return found


def judged_contexts(task: CyclicSequence, settings: dict[str, Any]) -> dict[str, Judged]:
    """What an autoencoder is measured on, by name.

    `unseen`: what neither it nor the transformer was trained on. `new`: what it was not trained on; the transformer was
    trained on contexts that begin like some of it. `windows`: what both were trained on.
    """
    rows, windows = unseen_rows(task, settings), task.windows(settings["block"])
    return {
        "unseen": Judged(rows, beginnings(known_rows(task, settings))),
        "new": Judged(rows, beginnings(windows) | beginnings(rows_of(task, settings))),
        "windows": Judged(windows),
    }


def training_activations(
    model: Any, module: str, task: CyclicSequence, settings: dict[str, Any], sort: str
) -> torch.Tensor:
    """What an autoencoder is trained on, [n, d_in], of a sort of `SORTS`: every different activation.

    Contexts have few beginnings and many ends: of all their symbols, most activations would be those of the first few.
    The windows are there as often as it takes to be `WINDOWS` of all.
    """
    windows = task.windows(settings["block"])
    true = Judged(windows).activations(model, module)
    if sort == "windows":
        return true
    wrong = Judged(rows_of(task, settings), beginnings(windows)).activations(model, module)
    repeats = max(1, round(WINDOWS / (1 - WINDOWS) * len(wrong) / len(true)))
    return torch.cat([true.repeat(repeats, 1), wrong])


def add_training(parser: argparse.ArgumentParser, steps: int) -> None:
    """The arguments that `trained` reads, and the model."""
    add = parser.add_argument
    add("--model", type=Path, default=Path("checkpoints/cyclic"), help="folder that train_cyclic.py wrote")
    add("--module", default="model.layers.0.residual", help="the module whose output is looked at")
    add("--contexts", choices=SORTS, default="both", help="trained on windows alone, or also on wrong contexts")
    add("--expansion-factor", type=float, default=0.5, help="latents per dimension")
    add("--steps", type=int, default=steps)
    add("--batch-size", type=int, default=2048, help="activations of a step")
    add("--lr", type=float, default=1e-2)
    add("--seed", type=int, default=0)


def trained(
    module: str, activations: torch.Tensor, args: argparse.Namespace, **config: Any
) -> tuple[SparseAutoencoder, list[dict[str, float]]]:
    """An autoencoder of a module's activations [n, d_in], and the log of its training."""
    stream = ActivationStream(
        lambda start: [activations][start:],
        args.batch_size,
        buffer_size=max(len(activations), 2 * args.batch_size),
        reuse=max(1, args.steps * args.batch_size // len(activations)),
        seed=args.seed,
    )
    sae = SparseAutoencoder(
        SparseAutoencoderConfig(
            d_in=activations.shape[-1],
            bandwidth=0.3,
            dead_after=DEAD_AFTER * args.batch_size,
            hook_name=module,
            **config,
        )
    )
    trainer = SparseAutoencoderTrainer(
        sae,
        SparseAutoencoderTrainingArguments(
            output_dir=str(args.output),
            max_steps=args.steps,
            learning_rate=args.lr,
            lr_scheduler_type="cosine",
            warmup_steps=args.steps // 50,
            sparsity_warmup_steps=args.steps // 4,
            resample_every=max(1, args.steps // 60),
            find_dead_every=20,
            logging_steps=max(1, args.steps // 40),
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=False,
            disable_tqdm=True,
            seed=args.seed,
        ),
        stream,
    )
    trainer.train()
    return sae.eval().cpu(), trainer.state.log_history


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The settings of a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_training(parser, steps=16000)
    add = parser.add_argument
    add("--variant", choices=VARIANTS, default="topk")
    add("--k", type=int, default=4, help="active latents, for topk and batchtopk")
    add("--sparsity-coefficient", type=float, default=0.1, help="penalty, for relu, jumprelu and gated")
    add("--output", type=Path, default=Path("checkpoints/cyclic-sae"))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    set_seed(args.seed)
    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    task, settings = task_of(args.model)
    block, module = settings["block"], args.module
    sorts = judged_contexts(task, settings)
    activations = training_activations(model, module, task, settings, args.contexts)
    sae, log = trained(
        module,
        activations,
        args,
        expansion_factor=args.expansion_factor,
        variant=args.variant,
        k=args.k,
        sparsity_coefficient=args.sparsity_coefficient,
    )
    sae.save_pretrained(args.output)

    result: dict[str, Any] = {name: judged.measure(model, module, sae) for name, judged in sorts.items()}
    measured = torch.tensor([entry["density"] for entry in result.values()]).amax(0) > 0
    with torch.no_grad():
        active = (sae.encode(activations) > 0).any(0) | measured
    result |= {"latents": len(active), "width": model.config.hidden_size}
    result |= {name: float((~these).double().mean()) for name, these in (("dead", active), ("unmeasured", measured))}
    result["extent"] = {name: judged.extent(model, module) for name, judged in sorts.items()}
    write_results(args, result)

    logged = [entry for entry in log if "l0" in entry]
    plots.training_curves(
        {"unexplained variance": [(entry["step"], 1 - entry["explained_variance"]) for entry in logged]},
        args.output / "training.png",
        y_label="share of variance",
        log=True,
    )
    densities = {"unseen contexts": result["unseen"]["density"], "windows": result["windows"]["density"]}
    plots.latent_density(densities, args.output / "density.png")
    sequence = task.window(0, task.period + block - 1)
    in_turn = [sequence[start : start + block] for start in range(task.period)]
    (of_cycle,) = module_activations(model, module, [{"input_ids": torch.tensor(in_turn)}])
    latents = sae.encode(of_cycle).detach().view(task.period, block, -1)[:, -1]
    labels = [str(window[-1]) for window in in_turn]
    plots.latents_over_cycle(latents, labels, args.output / "cycle.png")
    for name in sorts:
        print(name, {key: value for key, value in result[name].items() if key != "density"})
    print(f"{args.output}")


if __name__ == "__main__":
    main()
