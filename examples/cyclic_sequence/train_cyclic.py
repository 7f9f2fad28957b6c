"""Train a small transformer to predict a sequence that holds every symbol for a while.

    python examples/cyclic_sequence/train_cyclic.py

The sequence 0…0 1…1 2…2 0…0 … has as many different windows as phases (18), all of which are trained on: their loss is
that of the whole population, and its least possible value is known. What the model never sees is a fifth of the windows
with one or two wrong symbols, and all with three: it is tested on these (a thousand of the last).

Writes the model, `results.json` and two figures into `--output`.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, set_seed

from senri_hf import SymbolicTransformerConfig, SymbolicTransformerForCausalLM
from senri_hf.interpretability import plots
from senri_hf.tasks import CyclicSequence


IGNORED = -100
# Wrong symbols in a context that training may see, and the most that testing has.
TRAINED_WRONG, TESTED_WRONG = (1, 2), (1, 2, 3)
MOST_TESTED = 1000


def contexts(task: CyclicSequence, block: int, held_out: float) -> tuple[list[tuple[list[int], int]], dict[int, Any]]:
    """Contexts with wrong symbols: those to train on, and by number of wrong symbols those never trained on."""
    training, testing = [], {}
    for wrong in TESTED_WRONG:
        found = task.corrupted(block, wrong)
        distinct = sorted({tuple(context) for context, _ in found})
        random.Random(wrong).shuffle(distinct)
        share = held_out if wrong in TRAINED_WRONG else 1.0
        unseen = set(distinct[: round(share * len(distinct))])
        training += [(context, follows) for context, follows in found if tuple(context) not in unseen]
        testing[wrong] = [list(context) for context in distinct[: min(len(unseen), MOST_TESTED)]]
    return training, testing


class Batches:
    """Makes a batch: all windows a few times, and contexts with wrong symbols, of which only the end is learned."""

    def __init__(self, task: CyclicSequence, block: int, repeats: int) -> None:
        windows = torch.tensor(task.windows(block + 1)).repeat(repeats, 1)
        self.inputs, self.labels = windows[:, :-1], windows[:, 1:]

    def __call__(self, items: list[tuple[list[int], int]]) -> dict[str, torch.Tensor]:
        inputs = torch.tensor([context for context, _ in items])
        labels = torch.full_like(inputs, IGNORED)
        labels[:, -1] = torch.tensor([follows for _, follows in items])
        labels = torch.cat([self.labels, labels])
        # The symbol to predict at each place, so that nothing is shifted.
        return {"input_ids": torch.cat([self.inputs, inputs]), "labels": labels, "shift_labels": labels}


@torch.no_grad()
def evaluate(
    model: SymbolicTransformerForCausalLM, task: CyclicSequence, testing: dict[int, list[list[int]]], length: int
) -> dict[str, Any]:
    """The exact loss over all windows, and what becomes of contexts that training never saw."""
    block = model.config.max_position_embeddings
    windows = torch.tensor(task.windows(block + 1))
    logits = model(windows[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()
    result: dict[str, Any] = {
        "loss": loss,
        "bayes_floor": task.floor(block),
        "above_floor": loss - task.floor(block),
        "phases": task.period,
        "phases_right": int((logits[:, -1].argmax(-1) == windows[:, -1]).sum()),
        "unseen": {},
    }
    for wrong, unseen in testing.items():
        rollouts = model.rollout(torch.tensor(unseen), length).tolist()
        settled = [task.settled(rollout) for rollout in rollouts]
        returned = [max(0, start - block) for start in settled if start is not None]
        result["unseen"][str(wrong)] = {
            "contexts": len(unseen),
            "returned": len(returned) / len(unseen),
            "steps_to_return": sum(returned) / max(1, len(returned)),
            # Within what the model said, not in what it was given.
            "forbidden_per_symbol": sum(task.forbidden(r[block:]) for r in rollouts) / (len(unseen) * (length - 1)),
        }
    return result


def write_results(args: argparse.Namespace, found: dict[str, Any]) -> None:
    """What a run found, below its settings, as `results.json` in `--output`."""
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "results.json").write_text(json.dumps({"settings": settings, **found}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--symbols", type=int, default=3)
    add("--hold", type=int, default=6, help="steps that each symbol is held")
    add("--block", type=int, default=10, help="symbols of context")
    add("--hidden-size", type=int, default=64)
    add("--num-layers", type=int, default=2)
    add("--num-heads", type=int, default=4)
    add("--no-mlp", action="store_true", help="attention only")
    add("--no-layer-norm", action="store_true")
    add("--steps", type=int, default=3000)
    add("--lr", type=float, default=3e-3)
    add("--wrong-per-batch", type=int, default=16, help="contexts with wrong symbols in a batch; 0 trains without them")
    add("--held-out", type=float, default=0.2, help="share of these contexts that is kept for testing")
    add("--rollout-length", type=int, default=72)
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=Path("checkpoints/cyclic"))
    args = parser.parse_args()

    set_seed(args.seed)
    task = CyclicSequence(args.symbols, args.hold)
    config = SymbolicTransformerConfig(
        vocab_size=args.symbols,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.num_heads,
        use_mlp=not args.no_mlp,
        use_layer_norm=not args.no_layer_norm,
        max_position_embeddings=args.block,
    )
    model = SymbolicTransformerForCausalLM(config)
    training, testing = contexts(task, args.block, args.held_out)
    if not args.wrong_per_batch:
        training = [(window[:-1], window[-1]) for window in task.windows(args.block + 1)]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.output),
            max_steps=args.steps,
            learning_rate=args.lr,
            lr_scheduler_type="cosine",
            warmup_steps=args.steps // 10,
            weight_decay=0.01,
            per_device_train_batch_size=args.wrong_per_batch or task.period,
            logging_steps=max(1, args.steps // 50),
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            disable_tqdm=True,
            seed=args.seed,
        ),
        train_dataset=training,
        data_collator=Batches(task, args.block, repeats=3),
    )
    trainer.train()
    model.eval().cpu()
    result = evaluate(model, task, testing, args.rollout_length)
    model.save_pretrained(args.output)
    write_results(args, result)

    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    curves = {
        "training loss, contexts with wrong symbols included": [(entry["step"], entry["loss"]) for entry in logged]
    }
    plots.training_curves(
        curves, args.output / "training.png", y_label="nats per symbol", lines={"Bayes floor": result["bayes_floor"]}
    )
    model.set_attn_implementation("eager")
    window = task.window(0, args.block)
    with torch.no_grad():
        attentions = model(torch.tensor([window]), output_attentions=True).attentions
    plots.attention_maps([layer[0] for layer in attentions], list(map(str, window)), args.output / "attention.png")

    print(json.dumps(result, indent=1))
    print(f"{args.output}")


if __name__ == "__main__":
    main()
