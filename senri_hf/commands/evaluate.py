"""`senri-hf eval`: the perplexity of a trained model, or its scores on tasks of lm-eval."""

import argparse
import json
import math
from typing import TYPE_CHECKING, Any

from ..files import write_json
from . import harness


if TYPE_CHECKING:
    from ..configuration.run import RunConfig

# What may be changed for an evaluation: its data, and how many rows are read at once.
CHANGEABLE = (
    "training_mode", "dataset_name", "dataset_subset", "eval_split", "text_field", "max_length", "batch_size",
)  # fmt: skip


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `eval` to the command line."""
    parser = commands.add_parser("eval", help="perplexity of a trained model on its evaluation split, or tasks")
    parser.add_argument("--checkpoint", required=True, metavar="FOLDER", help="what train or merge wrote")
    parser.add_argument("--config", metavar="FILE", help="data; that of the checkpoint's own run when left out")
    parser.add_argument("--out", metavar="FILE", help="write the figures as JSON too")
    harness.add_arguments(parser)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=f"any of {', '.join(CHANGEABLE)}")
    parser.set_defaults(run=run_eval)


def run_eval(arguments: argparse.Namespace) -> int:
    """Print loss, perplexity and the number of tokens; with `--tasks`, their scores."""
    if arguments.tasks is not None:
        if arguments.config is not None or arguments.overrides:
            raise ValueError("--tasks was given, whose questions are lm-eval's own: leave --config and KEY=VALUE out")
        return report(harness.scores(arguments), arguments.out)
    from ..training import run as runs

    run = runs.load_checkpoint(arguments.checkpoint, settings(arguments))
    split = run.config.training.eval_split
    if split is None:
        raise ValueError("eval_split=null: name the split to evaluate, for example eval_split=test")
    figures = perplexity(run.model, runs.encoded(run, split), runs.collator(run), run.config.training.batch_size)
    return report(figures, arguments.out)


def settings(arguments: argparse.Namespace) -> "RunConfig | None":
    """The settings to evaluate with; None where there are none beside the checkpoint.

    Raises:
        ValueError: for a setting that an evaluation does not go by, or that is not the checkpoint's.
    """
    from ..configuration.run import RunConfig, section_of
    from ..training import run as runs

    for override in arguments.overrides:
        name = override.partition("=")[0].rpartition(".")[2]
        if name not in CHANGEABLE:
            raise ValueError(
                f"{override!r} was given, but {name} is a setting of the section {section_of(name)} that an evaluation "
                f"takes from the checkpoint; it may change {', '.join(CHANGEABLE)}"
            )
    beside = runs.settings_file(arguments.checkpoint)
    if beside is None or arguments.config is None:
        given = arguments.config or beside
        return None if given is None else RunConfig.load(given, arguments.overrides)
    config, trained = RunConfig.load(arguments.config, arguments.overrides), RunConfig.load(beside)
    for section in ("memory", "model"):
        for name, real in vars(getattr(trained, section)).items():
            value = getattr(getattr(config, section), name)
            if name in config.given and value != real:
                raise ValueError(
                    f"{name}={value!r} stands in {arguments.config}, but {arguments.checkpoint} was trained with "
                    f"{real!r}; leave --config out, or name the checkpoint's own"
                )
    trained.training = config.training
    trained.check()
    return trained


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
    if not count:
        raise ValueError("There is no token to predict in these rows: nothing in them is a label")
    mean = total / count
    return {"loss": mean, "perplexity": math.exp(mean), "tokens": count}
