"""What an LLM remembers: an introduction, a correction, and decay, each in conversations of their own.

python examples/name_recall/experiment_llm.py --simple
python examples/name_recall/experiment_llm.py --interactive
"""

import argparse
import logging
import sys
import time
from pathlib import Path

from peft import get_peft_model

import senri_hf
from senri_hf.commands.chat import find_adapter, load_model
from senri_hf.files import write_json
from senri_hf.memory.owner import owners
from senri_hf.tasks import Question, score_reply


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--interactive", "-i", action="store_true", help="chat; an empty line ends a conversation, /quit the session"
    )
    mode.add_argument("--simple", "-s", action="store_true", help="tell, clear the context, ask: nothing else")
    add("--model", default="smollm2-135m-instruct", help="a name that senri_hf.load_base knows, a Hub id or a folder")
    add("--checkpoint", help="folder of a trained adapter; the shipped one without it")
    add("--memory-layers", help="comma-separated layers of a new, untrained adapter; a checkpoint has its own")
    add("--initial-name", default="Alice", help="the name of the introduction")
    add("--corrected-name", default="Sarah", help="the name of the correction")
    add("--decay-cycles", type=int, default=10, help="decay cycles between conversations")
    add("--output-dir", type=Path, default=Path("experiment_results"), help="where the results and the log go")
    args = parser.parse_args()
    layers = args.memory_layers
    if layers is not None and not all(layer.strip().isdigit() for layer in layers.split(",")):
        parser.error(f"--memory-layers {layers!r} was given, but it takes numbers of layers: 3,6,9")
    return args


def load(args: argparse.Namespace) -> senri_hf.MemoryChat:
    """The model to talk to: with a checkpoint, with a new adapter on given layers, or with the shipped adapter."""
    asked = [int(layer) for layer in args.memory_layers.split(",")] if args.memory_layers else None
    if asked and not args.checkpoint:
        base, tokenizer = senri_hf.load_base(args.model)
        model = get_peft_model(base, senri_hf.MemoryAdapterConfig(layers_to_transform=asked)).eval()
        print(
            f"Warning: --memory-layers {args.memory_layers} without --checkpoint makes an adapter that is not trained "
            "and adds nothing to what the model says; train.py trains one.",
            file=sys.stderr,
        )
        return senri_hf.MemoryChat(model, tokenizer)
    model, tokenizer = load_model(args.model, find_adapter(args.model, args.checkpoint))
    if asked:
        own = sorted({owner.layer_idx for owner in owners(model)})
        if own != sorted(set(asked)):
            print(
                f"Warning: --memory-layers {args.memory_layers} was given, but the checkpoint {args.checkpoint} has "
                f"its memory in the layers {','.join(map(str, own)) or 'none'}: those are used.",
                file=sys.stderr,
            )
    return senri_hf.MemoryChat(model, tokenizer)


class Experiment:
    """Runs phases, each in a conversation of its own, and keeps what was said."""

    def __init__(self, chat: senri_hf.MemoryChat, log: logging.Logger, names: tuple[str, ...]) -> None:
        self.chat, self.log, self.names = chat, log, names
        self.phases: list[dict] = []

    def phase(self, name: str, text: str, expected: str | None = None, *, write: bool) -> None:
        self.chat.new_conversation()
        reply, info = self.chat.say(text, update_memory=write, max_new_tokens=32)
        self.chat.new_conversation()
        others = tuple(name for name in self.names if name != expected)
        question = Question([{"role": "user", "content": text}], "", "name", expected or "", others)
        found = None if expected is None else score_reply(reply, question)
        self.phases.append(
            {"phase": name, "said": text, "reply": reply.strip(), "expected": expected, "recalled": found,
             "tokens_written": info.tokens_written, "seconds": info.seconds}
        )  # fmt: skip
        outcome = "" if found is None else f"\n  {expected!r} {'recalled' if found else 'not recalled'}"
        self.log.info("%s\n  you   > %s\n  model > %s%s", name, text, reply.strip(), outcome)

    def decay(self, cycles: int) -> None:
        self.chat.memory.decay(cycles)
        self.log.info("%d decay cycles", cycles)


def main() -> None:
    args = parse()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    stamp = time.strftime("%Y%m%d_%H%M%S")
    log = logging.getLogger("experiment")
    log.setLevel(logging.INFO)
    log.addHandler(logging.StreamHandler())
    log.addHandler(logging.FileHandler(args.output_dir / f"llm_experiment_{stamp}.log"))
    experiment = Experiment(load(args), log, (args.initial_name, args.corrected_name))
    if args.interactive:
        interactive(experiment)
    else:
        question = "What is my name?"
        experiment.phase("before", question, args.initial_name, write=False)
        experiment.phase("introduction", f"Hello! My name is {args.initial_name}.", write=True)
        experiment.phase("recall", question, args.initial_name, write=False)
        if not args.simple:
            experiment.decay(args.decay_cycles)
            experiment.phase("recall after decay", question, args.initial_name, write=False)
            experiment.phase("correction", f"Actually, my name is {args.corrected_name}.", write=True)
            experiment.phase("recall after correction", question, args.corrected_name, write=False)
            experiment.decay(args.decay_cycles)
            experiment.phase("recall after correction and decay", question, args.corrected_name, write=False)
    path = args.output_dir / f"llm_experiment_results_{stamp}.json"
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    memory = experiment.chat.memory.summary()
    write_json(path, {"settings": settings, "phases": experiment.phases, "memory": memory})
    print(f"Results: {path}")


def interactive(experiment: Experiment) -> None:
    """Free conversations; what is said in one is remembered in the next. Ctrl-D and Ctrl-C end the session too."""
    chat = experiment.chat
    print("Talk. An empty line ends the conversation, /quit the session.")
    try:
        while (text := input("you   > ").strip()) != "/quit":
            if not text:
                chat.new_conversation()
                print("(a new conversation)")
                continue
            reply, info = chat.say(text)
            print(f"model > {reply.strip()}")
            experiment.phases.append({"phase": "chat", "said": text, "reply": reply.strip(), "seconds": info.seconds})
    except (EOFError, KeyboardInterrupt):
        print()


if __name__ == "__main__":
    main()
