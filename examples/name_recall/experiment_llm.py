"""What an LLM remembers: an introduction, a correction, and decay, each in conversations of their own.

python examples/name_recall/experiment_llm.py --simple
python examples/name_recall/experiment_llm.py --interactive
"""

import argparse
import json
import logging
import time
from pathlib import Path

from peft import get_peft_model

import senri_hf
from senri_hf.commands.chat import find_adapter, load_model
from senri_hf.tasks import Question, score_reply


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--interactive", "-i", action="store_true", help="chat; an empty line ends a conversation, /quit the session")
    add("--simple", "-s", action="store_true", help="tell, clear the context, ask: nothing else")
    add("--model", default="smollm2-135m-instruct", help="a name that senri_hf.load_base knows, a Hub id or a folder")
    add("--checkpoint", help="folder of a trained adapter; the shipped one without it")
    add("--memory-layers", help="comma-separated layers of a new, untrained adapter, instead of a checkpoint")
    add("--initial-name", default="Alice", help="the name of the introduction")
    add("--corrected-name", default="Sarah", help="the name of the correction")
    add("--decay-cycles", type=int, default=10, help="decay cycles between conversations")
    add("--output-dir", type=Path, default=Path("experiment_results"), help="where the results and the log go")
    args = parser.parse_args()
    if args.memory_layers and args.checkpoint:
        parser.error("--memory-layers makes a new adapter, --checkpoint loads a trained one: give one of them")
    return args


def load(args: argparse.Namespace) -> senri_hf.MemoryChat:
    if args.memory_layers:
        base, tokenizer = senri_hf.load_base(args.model)
        layers = [int(layer) for layer in args.memory_layers.split(",")]
        model = get_peft_model(base, senri_hf.MemoryAdapterConfig(layers_to_transform=layers)).eval()
    else:
        model, tokenizer = load_model(args.model, find_adapter(args.model, args.checkpoint))
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
    scratch = path.with_suffix(".tmp")
    scratch.write_text(
        json.dumps(
            {"settings": settings, "phases": experiment.phases, "memory": experiment.chat.memory.summary()}, indent=1
        )
    )
    scratch.replace(path)
    print(f"Results: {path}")


def interactive(experiment: Experiment) -> None:
    """Free conversations; what is said in one is remembered in the next."""
    chat = experiment.chat
    print("Talk. An empty line ends the conversation, /quit the session.")
    while (text := input("you   > ").strip()) != "/quit":
        if not text:
            chat.new_conversation()
            print("(a new conversation)")
            continue
        reply, info = chat.say(text)
        print(f"model > {reply.strip()}")
        experiment.phases.append({"phase": "chat", "said": text, "reply": reply.strip(), "seconds": info.seconds})


if __name__ == "__main__":
    main()
