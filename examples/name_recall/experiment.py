"""The episodic memory by itself, without a language model: a name is repeated, decays, and is corrected.

Tokens are embedded by hashing their letter triples, so that equal words are equal and similar words are similar. There
is no model to predict them: a word surprises by how little it is like those before it in the sentence and in memory.

    python examples/name_recall/experiment.py --reinforcement-turns 5 --decay-cycles 10
"""

import argparse
import logging
import time
import zlib
from pathlib import Path

import torch

from senri_hf import EpisodicConfig
from senri_hf.files import write_json
from senri_hf.memory import EpisodicLayer, file
from senri_hf.memory.episodic import cosine, nearest_slot
from senri_hf.memory.episodic_layer import Tokens


HIDDEN = 768
PLACE = "experiment.0."  # adapter and layer in the file


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--interactive", "-i", action="store_true", help="ask for names and numbers")
    add("--initial-name", default="Alice", help="the name that is reinforced")
    add("--corrected-name", default="Sarah", help="the name of the correction")
    add("--reinforcement-turns", type=int, default=5, help="how often the name is repeated before the correction")
    add("--decay-cycles", type=int, default=10, help="decay cycles between conversations")
    add("--output-dir", type=Path, default=Path("experiment_results"), help="where the results go")
    add("--save-memory", type=Path, help="save the memory to this folder at the end")
    add("--load-memory", type=Path, help="begin with the memory in this folder")
    add("--auto-save", action="store_true", help="save the memory in the output folder")
    args = parser.parse_args()
    if args.interactive:
        for name in ("initial_name", "corrected_name", "reinforcement_turns", "decay_cycles"):
            setattr(args, name, asked(name.replace("_", " "), getattr(args, name)))
    return args


def asked(what: str, default: str | int) -> str | int:
    """What a person answers, or the default for an empty line; Ctrl-D ends the program."""
    while True:
        try:
            answer = input(f"{what} [{default}]: ").strip()
        except EOFError:
            raise SystemExit("\nNothing was run.") from None
        if isinstance(default, str):
            return answer or default
        if not answer or answer.isdecimal():
            return int(answer or default)
        print(f"{answer!r} is not a number of at least 0")


def embed(word: str) -> torch.Tensor:
    """[HIDDEN] with RMS 1: a sum of one random vector for every three letters of the word."""
    padded = f"<{word}>"
    vector = torch.zeros(HIDDEN)
    for start in range(len(padded) - 2):
        seed = zlib.crc32(padded[start : start + 3].encode())
        vector += torch.randn(HIDDEN, generator=torch.Generator().manual_seed(seed))
    return vector / vector.square().mean().sqrt()


class Experiment:
    def __init__(self, config: EpisodicConfig) -> None:
        self.layer = EpisodicLayer(config)
        self.phases: list[dict] = []

    def say(self, phase: str, text: str, names: list[str]) -> None:
        """Write a conversation of one sentence."""
        words = text.split()
        hidden = torch.stack([embed(word) for word in words])[None]
        surprise = self.novelty(hidden)
        access = torch.zeros(1, len(words), self.layer.config.store_slots)
        asked = torch.zeros(1, len(words), 0)  # no topics to tell conversations apart
        self.layer.append(Tokens(hidden, surprise, access, asked, torch.ones(1, len(words), dtype=torch.bool)))
        self.layer.clear_context()
        self.measure(phase, names)

    def novelty(self, tokens: torch.Tensor) -> torch.Tensor:
        """1 - cosine of tokens [1, T, D] and the likest one before each, in the sentence or in memory, [1, T]."""
        before = cosine(tokens, tokens)[0].tril(-1)
        state = self.layer.readable
        if state is not None:
            config = self.layer.config
            held = torch.cat([state.buffer, state.store], dim=1)
            live = torch.cat([state.live_buffer(config), state.live_store()], dim=1)
            before = torch.cat([before, cosine(tokens, held)[0] * live], dim=-1)
        return (1.0 - before.amax(-1).clamp_min(0.0))[None]

    def measure(self, phase: str, names: list[str]) -> None:
        """How strong each name is in the buffer and whether the store holds it."""
        found = {}
        state = self.layer.readable
        for name in names:
            if state is None:
                found[name] = {"strength": 0.0, "stored": False}
                continue
            token = embed(name)[None, None]
            nearest, slot = nearest_slot(cosine(token, state.buffer)[0, 0])
            live = state.live_buffer(self.layer.config)[0, slot] & (nearest > 0.9)
            stored = (cosine(token, state.store)[0, 0] > 0.9) & state.live_store()[0]
            found[name] = {"strength": float(state.strength[0, slot] * live), "stored": bool(stored.any())}
        self.phases.append({"phase": phase, "names": found, **self.layer.summary()})

    def decay(self, cycles: int, names: list[str]) -> None:
        self.layer.decay(cycles)
        self.measure(f"after {cycles} decay cycles", names)


def main() -> None:
    args = parse()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    log = logging.getLogger("experiment")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    experiment = Experiment(EpisodicConfig(novelty_threshold=0.95, consolidation_similarity=0.95))
    if args.load_memory:
        tensors, _ = file.load(args.load_memory)
        tensors = {name.removeprefix(PLACE): tensor for name, tensor in tensors.items()}
        experiment.layer.check_state_dict(tensors)
        experiment.layer.load_state_dict(tensors)
    names = [args.initial_name, args.corrected_name]
    for turn in range(args.reinforcement_turns):
        experiment.say(f"reinforcement {turn + 1}", f"Hello my name is {args.initial_name}", names)
    experiment.decay(args.decay_cycles, names)
    experiment.say("correction", f"Actually my name is {args.corrected_name}", names)
    experiment.decay(args.decay_cycles, names)
    for phase in experiment.phases:
        log.info("%-24s %s", phase["phase"], ", ".join(
            f"{name}: strength {found['strength']:.2f}{', stored' if found['stored'] else ''}"
            for name, found in phase["names"].items()
        ))  # fmt: skip
    path = args.output_dir / f"embedding_experiment_results_{time.strftime('%Y%m%d_%H%M%S')}.json"
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    write_json(path, {"settings": settings, "phases": experiment.phases})
    log.info("Results: %s", path)
    folder = args.save_memory or (args.output_dir / "memory" if args.auto_save else None)
    if folder:
        model = {"architecture": "embedding experiment", "num_hidden_layers": 1, "hidden_size": HIDDEN}
        description = {"model": model, "tokens_seen": experiment.layer.tokens_seen.tolist(), "parent": None,
                       "layers": [["experiment", 0, experiment.layer._layer_type]]}  # fmt: skip
        file.save({PLACE + name: t for name, t in experiment.layer.state_dict().items()}, description, folder)
        log.info("Memory: %s", folder)


if __name__ == "__main__":
    main()
