"""`senri-hf`: the command line."""

import argparse
import sys
from collections.abc import Sequence

from .. import __version__
from . import chat, evaluate, generate, memory, merge, sae, train


EXPECTED_ERROR = 2
INTERRUPTED = 130


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands; each sets `run`, a function of the parsed arguments that returns the exit code."""
    parser = argparse.ArgumentParser(prog="senri-hf", description="Memory that lasts, for Hugging Face models.")
    parser.add_argument("--version", action="version", version=f"senri_hf {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (train, evaluate, generate, merge, chat, memory, sae):
        command.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns its exit code: 0, 2 for an error that a person can mend, 130 when interrupted."""
    from huggingface_hub.errors import StrictDataclassError

    parsed = build_parser().parse_args(arguments)
    try:
        code: int = parsed.run(parsed)
    except (OSError, ValueError, StrictDataclassError) as error:
        print(f"senri-hf: error: {error}", file=sys.stderr)
        return EXPECTED_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
    return code


if __name__ == "__main__":
    sys.exit(main())
