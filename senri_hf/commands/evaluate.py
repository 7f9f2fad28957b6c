"""`senri-hf eval`: the perplexity of a trained model, or its scores on tasks of lm-eval."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from ..files import write_json
from . import harness


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `eval` to the command line."""
    parser = commands.add_parser("eval", help="perplexity of a trained model on its evaluation split, or tasks")
    parser.add_argument("--checkpoint", required=True, metavar="FOLDER", help="what train or merge wrote")
    parser.add_argument("--config", metavar="FILE", help="settings; those beside the checkpoint when left out")
    parser.add_argument("--out", metavar="FILE", help="write the figures as JSON too")
    harness.add_arguments(parser)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings over those of the file")
    parser.set_defaults(run=run_eval)


def run_eval(arguments: argparse.Namespace) -> int:
    """Print loss, perplexity and the number of tokens; with `--tasks`, their scores."""
    if arguments.tasks is not None:
        return report(harness.scores(arguments), arguments.out)
    from ..configuration.run import RunConfig
    from ..training import run as runs

    config = None
    if arguments.config is not None:
        config = RunConfig.load(arguments.config, arguments.overrides)
    run = runs.load_checkpoint(arguments.checkpoint, config)
    if config is None and arguments.overrides:
        settings = Path(arguments.checkpoint) / runs.EFFECTIVE
        settings = settings if settings.is_file() else settings.parent.parent / runs.EFFECTIVE
        run.config.training = RunConfig.load(settings, arguments.overrides).training
    split = run.config.training.eval_split
    if split is None:
        raise ValueError("eval_split=null: name the split to evaluate, for example eval_split=test")
    figures = perplexity(run.model, runs.encoded(run, split), runs.collator(run), run.config.training.batch_size)
    return report(figures, arguments.out)


def report(figures: dict[str, Any], out: str | None) -> int:
    """Print figures, and write them to a file where one is named."""
    print(json.dumps(figures, indent=1))
    if out is not None:
        write_json(out, figures)
    return 0


def perplexity(model: Any, rows: list[dict[str, list[int]]], collate: Any, batch_size: int) -> dict[str, float]:
    """Mean negative log-likelihood of the labelled tokens, each counting once, and its exponential."""
    import torch

    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(rows), batch_size):
            batch = {name: value.to(model.device) for name, value in collate(rows[start : start + batch_size]).items()}
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch, use_cache=False).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum"
            )
            total, count = total + loss.item(), count + int((labels != -100).sum())
    mean = total / count
    return {"loss": mean, "perplexity": math.exp(mean), "tokens": count}
