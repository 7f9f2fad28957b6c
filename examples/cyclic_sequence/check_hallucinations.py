"""What the transformer says after contexts that are wrong, random, or cut short.

    python examples/cyclic_sequence/check_hallucinations.py

For every kind of context: how often the next symbol is one that may follow, how often the model is back in the exact
cycle and after how many symbols, and how many of the symbols that it says can never follow the one before, the first
of them after the last one given included.

Writes `results.json` into `--output`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from train_cyclic import contexts, judged, write_results
from train_sae import known_rows, task_of
from transformers import AutoModelForCausalLM


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The settings of a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, default=Path("checkpoints/cyclic"), help="folder that train_cyclic.py wrote")
    add("--count", type=int, default=500, help="contexts of each kind, at most")
    add("--length", type=int, default=72, help="symbols to generate")
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=Path("checkpoints/cyclic-hallucinations"))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    task, settings = task_of(args.model)
    block = settings["block"]
    testing = contexts(task, block, settings["held_out"])[1]
    seen = {tuple(context) for context in known_rows(task, settings)}
    generator = torch.Generator().manual_seed(args.seed)
    unseen = {
        **{f"{wrong} wrong": of_sort for wrong, of_sort in testing.items()},
        "random symbols": torch.randint(task.symbols, (2 * args.count, block), generator=generator).tolist(),
        "one symbol for the whole window": [[symbol] * block for symbol in range(task.symbols)],
    }
    unseen = {name: [c for c in sort if tuple(c) not in seen][: args.count] for name, sort in unseen.items()}
    # Training has these: the windows, and their first symbols.
    known = {"true windows": task.windows(block), "a single symbol": [[symbol] for symbol in range(task.symbols)]}
    found = {
        name: {sort: judged(model, task, torch.tensor(given), args.length) for sort, given in sorts.items() if given}
        for name, sorts in (("unseen", unseen), ("known", known))
    }
    write_results(args, found)
    for name, row in (found["unseen"] | found["known"]).items():
        print(
            f"{name:34s} {row['contexts']:4.0f} contexts, next symbol right {row['right']:6.1%}, back in the cycle "
            f"{row['returned']:6.1%} after {row['symbols_to_return']:.2f} symbols, forbidden "
            f"{row['forbidden_per_symbol']:.4f} a symbol"
        )
    print(f"{args.output}")


if __name__ == "__main__":
    main()
