"""`senri-hf train`: a run from a YAML file, alone or under `accelerate launch`."""

import argparse
from pathlib import Path

from ..files import write_json


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `train` to the command line."""
    parser = commands.add_parser("train", help="train a memory transformer, or memory and LoRA in a model that exists")
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="YAML with the sections memory, model, training"
    )
    parser.add_argument(
        "--resume", metavar="FOLDER", help="go on from this checkpoint, or from the latest one of this run"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings over those of the file")
    parser.set_defaults(run=run_train)


def run_train(arguments: argparse.Namespace) -> int:
    """Train, and print where the final model is and how it did."""
    from ..configuration.run import RunConfig
    from ..training import run as runs

    config = RunConfig.load(arguments.config, arguments.overrides)
    if arguments.resume is not None:
        config.training.resume_from_checkpoint = arguments.resume
    resumed = config.training.resume_from_checkpoint
    checkpoint = None if resumed is None else str(runs.checkpoint_to_resume(Path(resumed)))
    if checkpoint is None:
        runs.check_unused(Path(config.training.output_dir))
    run = runs.prepare(config)
    trainer = runs.trainer_of(run)
    if trainer.args.should_save:
        runs.write_effective(config, Path(config.training.output_dir))
    trainer.train(resume_from_checkpoint=checkpoint)
    folder = runs.save(run, trainer)
    if trainer.args.should_save:
        history = Path(config.training.output_dir) / "training_history.json"
        write_json(history, trainer.state.log_history)
        print(runs.wrapped_in(trainer))
        print(f"The model is in {folder}, and what was logged in {history}")
    return 0
