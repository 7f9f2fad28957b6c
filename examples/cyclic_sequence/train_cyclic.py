"""Train a small transformer to predict a sequence that holds every symbol for a while.

    python examples/cyclic_sequence/train_cyclic.py

The sequence 0…0 1…1 2…2 0…0 … has as many different windows as phases (18), all of which are trained on: their loss is
that of the whole population, and its least possible value is known. What the model never sees is a fifth of the
contexts that differ from the nearest window in one, two or three symbols, and all that differ in four: it is tested on
these (at most a thousand of each).

Writes the model, `results.json` and two figures into `--output`.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, set_seed

from senri_hf import SymbolicTransformerConfig, SymbolicTransformerForCausalLM
from senri_hf.files import write_json
from senri_hf.interpretability import plots
from senri_hf.tasks import CyclicSequence


IGNORED = -100
# Wrong symbols in a context that training may see, and the most that testing has.
TRAINED_WRONG, TESTED_WRONG = (1, 2, 3), (1, 2, 3, 4)
MOST_TESTED = 1000


def contexts(
    task: CyclicSequence, block: int, held_out: float
) -> tuple[dict[int, list[tuple[list[int], int]]], dict[int, list[list[int]]]]:
    """Contexts by their wrong symbols: those to train on, each with what may follow, and those never trained on.

    Wrong are the symbols in which a context differs from the nearest window: one that is near to several phases counts
    once, so that none is tested on which training has for another phase.

    Args:
        held_out: Share of contexts with `TRAINED_WRONG` wrong symbols that is kept from training; of others all are.
    """
    training: dict[int, list[tuple[list[int], int]]] = {}
    testing: dict[int, list[list[int]]] = {}
    nearer: set[tuple[int, ...]] = set()
    for wrong in TESTED_WRONG:
        found = [(tuple(context), follows) for context, follows in task.corrupted(block, wrong)]
        found = [(context, follows) for context, follows in found if context not in nearer]
        distinct = sorted({context for context, _ in found})
        nearer |= set(distinct)
        random.Random(wrong).shuffle(distinct)
        share = held_out if wrong in TRAINED_WRONG else 1.0
        unseen = set(distinct[: round(share * len(distinct))])
        training[wrong] = [(list(context), follows) for context, follows in found if context not in unseen]
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


def nearest_follows(task: CyclicSequence, context: Sequence[int]) -> set[int]:
    """The symbols that may follow a context: those after the true windows that differ from it in the fewest symbols."""
    windows = task.windows(len(context) + 1)
    wrong = [sum(a != b for a, b in zip(context, window, strict=False)) for window in windows]
    return {window[-1] for window, count in zip(windows, wrong, strict=True) if count == min(wrong)}


def judged(
    model: SymbolicTransformerForCausalLM, task: CyclicSequence, given: torch.Tensor, length: int
) -> dict[str, float]:
    """What becomes of contexts [n, T] when the model goes on for `length` symbols.

    Returns:
        `contexts` counted. `right`: the share in which the first symbol said is one that may follow. `returned`: the
        share that is in the exact cycle by the end, after `symbols_to_return` in the mean and `slowest` at most.
        `forbidden_per_symbol`: of the symbols said, the first one included, those that never follow the one before.
        `forbidden_first` is the same for the first alone, after the last symbol given, and `forbidden_later` for all
        after it. After a wrong symbol all that may follow can be of that sort: `forbidden_avoidable` is
        `forbidden_per_symbol` without such first ones.
    """
    start, count = given.shape[1], len(given)
    rollouts = model.rollout(given, length).tolist()
    follows = [nearest_follows(task, context) for context in given.tolist()]
    settled = [task.settled(rollout) for rollout in rollouts]
    returned = [max(0, at - start) for at in settled if at is not None]
    first = [task.forbidden(rollout[start - 1 : start + 1]) for rollout in rollouts]
    avoidable = [
        bool(jumped) and any(not task.forbidden([rollout[start - 1], symbol]) for symbol in may)
        for jumped, rollout, may in zip(first, rollouts, follows, strict=True)
    ]
    later = sum(task.forbidden(rollout[start:]) for rollout in rollouts)
    return {
        "contexts": count,
        "right": sum(r[start] in may for r, may in zip(rollouts, follows, strict=True)) / count,
        "returned": len(returned) / count,
        "symbols_to_return": sum(returned) / max(1, len(returned)),
        "slowest": max(returned, default=0),
        "forbidden_per_symbol": (sum(first) + later) / (count * length),
        "forbidden_avoidable": (sum(avoidable) + later) / (count * length),
        "forbidden_first": sum(first) / count,
        "forbidden_later": later / (count * max(1, length - 1)),
    }


@torch.no_grad()
def evaluate(
    model: SymbolicTransformerForCausalLM, task: CyclicSequence, testing: dict[int, list[list[int]]], length: int
) -> dict[str, Any]:
    """The exact loss over all windows, and what becomes of contexts that training never saw."""
    block = model.config.max_position_embeddings
    windows = torch.tensor(task.windows(block + 1))
    logits = model(windows[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()
    return {
        "loss": loss,
        "bayes_floor": task.floor(block),
        "above_floor": loss - task.floor(block),
        "phases": task.period,
        "phases_right": int((logits[:, -1].argmax(-1) == windows[:, -1]).sum()),
        "unseen": {
            str(wrong): judged(model, task, torch.tensor(unseen), length) for wrong, unseen in testing.items() if unseen
        },
    }


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments as `results.json` has them."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


def write_results(args: argparse.Namespace, found: dict[str, Any]) -> None:
    """What a run found, below its settings, as `results.json` in `--output`."""
    write_json(args.output / "results.json", {"settings": settings_of(args), **found})


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The settings of a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--symbols", type=int, default=3)
    add("--hold", type=int, default=6, help="steps that each symbol is held")
    add("--block", type=int, default=10, help="symbols of context")
    add("--hidden-size", type=int, default=64)
    add("--num-layers", type=int, default=2)
    add("--num-heads", type=int, default=1)
    add("--no-mlp", action="store_true", help="attention only")
    add("--no-layer-norm", action="store_true")
    add("--steps", type=int, default=3000)
    add("--lr", type=float, default=3e-3)
    add("--wrong-per-batch", type=int, default=16, help="contexts with wrong symbols in a batch; 0 trains without them")
    add("--held-out", type=float, default=0.2, help="share of these contexts that is kept for testing")
    add("--rollout-length", type=int, default=72)
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=Path("checkpoints/cyclic"))
    args = parser.parse_args(arguments)
    if not 0 < args.held_out < 1:
        parser.error(f"--held-out {args.held_out}: a share above 0 and below 1 is due, as both parts are needed")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
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
    by_wrong, testing = contexts(task, args.block, args.held_out)
    training = [item for of_wrong in by_wrong.values() for item in of_wrong]
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
            dataloader_pin_memory=False,
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
        curves,
        args.output / "training.png",
        y_label="nats per symbol",
        lines={"Bayes floor of the windows": result["bayes_floor"]},
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
