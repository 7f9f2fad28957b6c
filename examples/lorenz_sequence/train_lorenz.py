"""Train a small transformer on the Lorenz system in three symbols, and compare what it says with the system itself.

    python examples/lorenz_sequence/train_lorenz.py

The equations are integrated, and x is read every tenth of a time unit: 0 and 2 are the wings of the attractor, 1 the
passage between them. Training and testing use different trajectories. The loss on the test trajectories is compared
with Markov chains that count what follows the last few symbols. Then symbols are drawn from the model, and their
autocorrelation is compared with that of the test trajectories, and with those of the shortest chain and of the best.

Writes the model, `results.json` and two figures into `--output`.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import Trainer, TrainingArguments, set_seed

from senri_hf import SymbolicTransformerConfig, SymbolicTransformerForCausalLM
from senri_hf.files import write_json
from senri_hf.interpretability import plots
from senri_hf.tasks import autocorrelation, lorenz_symbols


SYMBOLS = 3
ORDERS = (1, 2, 4, 8)
ROWS = 64


class Windows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Every window of a length, of every trajectory, and the symbol to predict at each place of it.

    The last place has one too: it is where the model stands when it generates.
    """

    def __init__(self, sequences: NDArray[np.int64], length: int) -> None:
        self.windows = torch.from_numpy(sequences).unfold(1, length + 1, 1).flatten(0, 1)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = self.windows[index]
        return {"input_ids": window[:-1], "labels": window[1:], "shift_labels": window[1:]}


def contexts_before(
    sequences: NDArray[np.int64], order: int, start: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For every symbol from `start` on: a number for the `order` symbols before it, and the symbol."""
    length = sequences.shape[1]
    code = np.zeros_like(sequences[:, start:])
    for back in range(order, 0, -1):
        code = code * SYMBOLS + sequences[:, start - back : length - back]
    return code.ravel(), sequences[:, start:].ravel()


def markov_chain(training: NDArray[np.int64], order: int) -> NDArray[np.float64]:
    """Probabilities of the next symbol [contexts, symbols] by counts, with half a count added to each."""
    counts = np.full((SYMBOLS**order, SYMBOLS), 0.5)
    np.add.at(counts, contexts_before(training, order, order), 1)
    return counts / counts.sum(1, keepdims=True)


def chain_loss(training: NDArray[np.int64], testing: NDArray[np.int64], order: int, start: int) -> float:
    """Nats per symbol of a Markov chain on the symbols of the test trajectories from `start` on."""
    return float(-np.log(markov_chain(training, order)[contexts_before(testing, order, start)]).mean())


def chain_sample(chain: NDArray[np.float64], first: NDArray[np.int64], steps: int, seed: int) -> NDArray[np.int64]:
    """Sequences [rows, steps] of a chain after first symbols [rows, order]."""
    rng, said = np.random.default_rng(seed), []
    code = first @ SYMBOLS ** np.arange(first.shape[1])[::-1]
    for _ in range(steps):
        said.append((rng.random((len(first), 1)) > chain[code].cumsum(1)).sum(1).clip(max=SYMBOLS - 1))
        code = (code * SYMBOLS + said[-1]) % len(chain)
    return np.stack(said, axis=1)


@torch.no_grad()
def model_loss(model: SymbolicTransformerForCausalLM, testing: NDArray[np.int64], block: int) -> float:
    """Nats per symbol on the symbols of the test trajectories from `block` on, each given the `block` ones before."""
    windows = Windows(testing, block).windows
    losses = [
        torch.nn.functional.cross_entropy(
            model(rows[:, :-1], logits_to_keep=1).logits[:, -1], rows[:, -1], reduction="sum"
        )
        for rows in windows.split(512)
    ]
    return float(torch.stack(losses).sum() / len(windows))


def jumps(sequences: NDArray[np.int64]) -> float:
    """The share of steps from one wing to the other without a passage between."""
    return float((np.abs(np.diff(sequences, axis=1)) == 2).mean())


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The settings of a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--trajectories", type=int, default=200, help="to train on")
    add("--test-trajectories", type=int, default=100)
    add("--length", type=int, default=400, help="symbols of a trajectory")
    add("--block", type=int, default=48, help="symbols of context")
    add("--hidden-size", type=int, default=64)
    add("--num-layers", type=int, default=2)
    add("--num-heads", type=int, default=4)
    add("--steps", type=int, default=1500)
    add("--lr", type=float, default=2e-3)
    add("--lags", type=int, default=60, help="of the autocorrelation")
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=Path("checkpoints/lorenz"))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    set_seed(args.seed)
    training = lorenz_symbols(args.trajectories, args.length, seed=2 * args.seed)
    testing = lorenz_symbols(args.test_trajectories, args.length, seed=2 * args.seed + 1)
    model = SymbolicTransformerForCausalLM(
        SymbolicTransformerConfig(
            vocab_size=SYMBOLS,
            hidden_size=args.hidden_size,
            num_hidden_layers=args.num_layers,
            num_attention_heads=args.num_heads,
            max_position_embeddings=args.block,
        )
    )
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.output),
            max_steps=args.steps,
            learning_rate=args.lr,
            lr_scheduler_type="cosine",
            warmup_steps=args.steps // 10,
            per_device_train_batch_size=ROWS,
            logging_steps=max(1, args.steps // 50),
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            seed=args.seed,
        ),
        train_dataset=Windows(training, args.block),
    )
    trainer.train()
    model.eval().cpu().save_pretrained(args.output)

    first = torch.from_numpy(testing[:, : args.block])
    said = model.rollout(first, args.length - args.block, do_sample=True)[:, args.block :].numpy()
    true = testing[:, args.block :]
    markov_loss = {order: chain_loss(training, testing, order, args.block) for order in ORDERS}
    shown = {"test trajectories": true, "transformer": said}
    for order in sorted({min(ORDERS), min(markov_loss, key=lambda order: markov_loss[order])}):
        begun = testing[:, args.block - order : args.block]
        chain = chain_sample(markov_chain(training, order), begun, said.shape[1], args.seed)
        shown[f"Markov chain of order {order}"] = chain
    correlations = {name: autocorrelation(sequences, args.lags) for name, sequences in shown.items()}
    # How far two samples of the system itself, of this size, are apart.
    again = autocorrelation(training[: len(true), args.block :], args.lags)
    reference = correlations["test trajectories"]
    result: dict[str, Any] = {
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "loss": model_loss(model, testing, args.block),
        "markov_loss": {str(order): loss for order, loss in markov_loss.items()},
        "autocorrelation": {name: values.tolist() for name, values in correlations.items()},
        "furthest": {
            name: float(np.abs(values - reference).max())
            for name, values in {**correlations, "other trajectories": again}.items()
            if name != "test trajectories"
        },
        "shares": {name: np.bincount(s.ravel(), minlength=SYMBOLS).tolist() for name, s in shown.items()},
        "jumps": {name: jumps(sequences) for name, sequences in shown.items()},
    }
    write_json(args.output / "results.json", result)
    logged = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    bounds = {f"Markov chain of order {order}": loss for order, loss in result["markov_loss"].items()}
    plots.training_curves({"training loss": logged}, args.output / "training.png", y_label="nats per symbol",
                          lines={name: bounds[name] for name in list(bounds)[::3]})  # fmt: skip
    plots.curves(
        {name: values.tolist() for name, values in correlations.items()},
        args.output / "autocorrelation.png",
        x_label="lag, tenths of a time unit",
        y_label="autocorrelation",
    )
    print(json.dumps({name: result[name] for name in ("loss", "markov_loss", "furthest", "jumps")}, indent=1))
    print(f"{args.output}")


if __name__ == "__main__":
    main()
