"""`senri-hf eval --tasks`: the tasks of lm-eval (the Language Model Evaluation Harness), by its own `hf` model."""

import argparse
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `eval` needs for tasks."""
    parser.add_argument(
        "--tasks",
        metavar="NAMES",
        help="instead of perplexity: tasks of lm-eval, by commas (pip install senri_hf[eval])",
    )
    parser.add_argument("--include-path", metavar="FOLDER", help="a folder of more tasks, as YAML files of lm-eval")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions of every task")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="questions that are asked at once")


def scores(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What lm-eval says of the model in a folder, by task and measure.

    Raises:
        OSError: when the folder holds no model, or lm-eval is not installed.
        ValueError: for tasks that there are not.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise OSError(f"--tasks needs lm-eval ({error}): pip install 'senri_hf[eval]'") from error
    manager = TaskManager(include_path=arguments.include_path)
    names = [name.strip() for name in arguments.tasks.split(",") if name.strip()]
    missing = [name for name in names if not manager.match_tasks([name])]
    if missing or not names:
        raise ValueError(f"--tasks {arguments.tasks!r} was given, but lm-eval has no task {', '.join(missing) or '…'}")
    model, tokenizer = load(arguments.checkpoint)
    evaluated = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=arguments.batch_size)
    found: Any = simple_evaluate(
        model=evaluated, tasks=names, task_manager=manager, limit=arguments.limit, bootstrap_iters=0
    )
    return {
        task: {name: value for name, value in measures.items() if isinstance(value, int | float)}
        for task, measures in found["results"].items()
    }


def load(checkpoint: str) -> tuple[Any, Any]:
    """A model and its tokenizer: from a run's folder, or from any that `save_pretrained` wrote."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..training import run as runs

    folder = Path(checkpoint)
    if any((place / runs.EFFECTIVE).is_file() for place in (folder, folder.parent)):
        run = runs.load_checkpoint(checkpoint)
        return run.model, run.tokenizer
    return AutoModelForCausalLM.from_pretrained(checkpoint).eval(), AutoTokenizer.from_pretrained(checkpoint)
