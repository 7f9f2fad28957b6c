"""Train a memory adapter that remembers what a person said in an earlier conversation.

    python examples/name_recall/train.py --model smollm2-135m-instruct

Checkpoints are adapters (safetensors); `training_history.json`, a log and a plot of loss and accuracy stand beside
them.
"""

import argparse
import importlib.util
import itertools
import json
import logging
import random
import shutil
import textwrap
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import load_peft_weights
from transformers import TrainerCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint

import senri_hf
from senri_hf.adapters import save_adapter
from senri_hf.bases import training_dtype
from senri_hf.files import whole, write_json
from senri_hf.tasks import general_conversations, recall_episodes, training_mixture
from senri_hf.tasks.text import ordinary_text
from senri_hf.training import WeightAverage


# Where settings of training are kept, and those that may be others when it goes on.
SETTINGS = "arguments.json"
FREE = ("checkpoint_dir", "eval_every", "license", "num_val", "resume", "resume_if_begun", "save_every")
PROSE_CHARACTERS = 280
TELLINGS = 24


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's arguments when None."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="smollm2-135m-instruct", help="a name that senri_hf.load_base knows, a Hub id or a folder")
    add(
        "--mechanism",
        choices=("episodic", "compressive"),
        default="episodic",
        help="how memory is held; slots, surprise, rank and topics are settings of episodic memory alone",
    )
    add(
        "--detach-every",
        type=int,
        help="conversations through which an answer teaches what is written; by default 1 with episodic memory, which "
        "learns to write by itself, and 16 with compressive memory",
    )
    add("--memory-head-dim", type=int, help="size of a head of compressive memory; the model's own by default")
    add("--lr", type=float, default=1e-4, help="learning rate")
    add("--from-adapter", type=Path, help="begin with what of this adapter's weights fits")
    add("--min-lr-ratio", type=float, default=0.0, help="share of the learning rate at which the schedule ends")
    add(
        "--average-from",
        type=float,
        help="share of the steps after which weights are averaged: the adapter at the end has their mean",
    )
    add("--gate-lr-multiplier", type=float, default=30.0, help="gates' learning rate as a multiple of that")
    add("--epochs", type=int, default=10, help="passes over the training episodes")
    add("--batch-size", type=int, default=1, help="episodes per forward pass")
    add("--grad-accum", type=int, default=4, help="forward passes per optimizer step")
    add("--eval-every", type=int, default=50, help="evaluate every N steps")
    add("--save-every", type=int, default=200, help="save a checkpoint every N steps")
    add("--checkpoint-dir", type=Path, default=Path("checkpoints"), help="where checkpoints go")
    add("--resume", nargs="?", const="last", help="go on from a checkpoint folder; from the last one without a value")
    add("--resume-if-begun", action="store_true", help="go on from the last checkpoint, if there is one; --resume wins")
    add("--memory-layers", default="3,6,9", help="comma-separated indices of decoder layers; 'auto' for every third")
    add("--warmup-steps", type=int, default=100, help="steps in which the learning rate rises")
    add("--num-train", type=int, default=500, help="training episodes")
    add("--num-val", type=int, default=50, help="validation episodes")
    add("--task", choices=("names", "facts"), default="facts", help="names only, or a mixture of everything told")
    add("--max-steps", type=int, default=-1, help="stop after this many steps, whatever the epochs")
    add("--buffer-slots", type=int, default=256, help="slots of the short-term buffer")
    add("--store-slots", type=int, default=128, help="slots of the surprise-gated store")
    add("--z-score-threshold", type=float, default=1.0, help="deviations above the mean from which a token is stored")
    add("--rank", type=int, default=16, help="rank of the trained change of the layers' own attention; 0: full copies")
    add("--topic-steps", type=int, default=0, help="steps before the first that only learn to tell conversations apart")
    add("--init", choices=("base_attention", "zero"), default="base_attention", help="what the memory read starts from")
    add(
        "--keep-every",
        type=int,
        default=3,
        help="in every N-th episode a reply to a general question and one to something told stay as without memory; "
        "0: in none",
    )
    add(
        "--prose-every",
        type=int,
        default=4,
        help="after every N-th episode a piece of a novel is to be read as without memory; 0: after none",
    )
    add(
        "--read-told-live",
        action="store_true",
        help="read told conversations with memory, instead of once and without it",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="dtype of the frozen base model; by default what training that goes on was begun with, or else bfloat16 "
        "where this machine computes in it",
    )
    add("--license", default="mit", help="the license on the adapter's card; a base's may bind what is made of it")
    add("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    if args.detach_every is None:
        args.detach_every = 1 if args.mechanism == "episodic" else 16
    return args


def dtype_of(checkpoint_dir: Path, resumes: bool) -> str:
    """The dtype that training was begun with, where it goes on, and else the one for this machine."""
    path = checkpoint_dir / SETTINGS
    if resumes and path.exists():
        return str(json.loads(path.read_text(encoding="utf-8"))["dtype"])
    return str(training_dtype()).removeprefix("torch.")


def keep_settings(args: argparse.Namespace, resumes: bool) -> None:
    """Write the settings beside the checkpoints; where training goes on they have to be those that it began with.

    One that is not in the file did not exist when training began: it was as it is by default.
    """
    path = args.checkpoint_dir / SETTINGS
    settings, default = (
        {name: str(value) for name, value in vars(given).items() if name not in FREE} for given in (args, parse([]))
    )
    if resumes and path.exists():
        begun = default | json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in sorted({*begun, *settings}) if begun.get(name) != settings.get(name)]
        if changed:
            was = ", ".join(
                f"--{name.replace('_', '-')} {begun.get(name)}, not {settings.get(name)}" for name in changed
            )
            raise SystemExit(
                f"{args.checkpoint_dir} was begun with {was}. Go on with that, or give another --checkpoint-dir"
            )
    write_json(path, settings)


def training_episodes(task: str, count: int, seed: int, keep_every: int, prose_every: int) -> list[dict]:
    """Episodes as lists of conversations.

    What is said in one told conversation of every `keep_every`-th, with others before it, and in a general one after
    all that is told, and a piece of prose before the questions of every `prose_every`-th, is to stay as without memory.
    """
    if task == "names":
        episodes = recall_episodes(count, split="train", relations="name", seed=seed)
    else:
        episodes = list(itertools.islice(training_mixture(seed, TELLINGS), count))
    chance = random.Random(seed)
    general, rows = general_conversations("train"), []
    for index, episode in enumerate(episodes):
        conversations = [[dict(message) for message in conversation] for conversation in episode.conversations]
        if keep_every and index % keep_every == 0:
            kept = [[dict(message) for message in chance.choice(general)]]
            if len(episode.told) > 1:
                kept.append(conversations[chance.randrange(1, len(episode.told))])
            for message in (message for conversation in kept for message in conversation):
                message["keep"] = message["role"] == "assistant"
            conversations.insert(len(episode.told), kept[0])
        rows.append({"conversations": conversations, "length": len(conversations)})
    if prose_every:
        for index, text in zip(range(0, count, prose_every), prose(seed), strict=False):
            place = len(episodes[index].told)  # before a general question
            rows[index]["conversations"].insert(place, [{"role": "text", "content": text, "keep": True}])
    return rows


def prose(seed: int) -> Iterator[str]:
    """Endless short pieces of a novel that no perplexity figure uses, in random order."""
    pieces = [piece for text in ordinary_text("brother-jacob") for piece in textwrap.wrap(text, PROSE_CHARACTERS)]
    chance = random.Random(seed)
    while True:
        yield chance.choice(pieces)


def validation_episodes(task: str, count: int, seed: int) -> list[dict]:
    """Episodes with values and phrasings that training never sees."""
    if task == "names":
        episodes = recall_episodes(count, split="validation", relations="name", seed=seed)
    else:
        episodes = recall_episodes(count, split="validation", facts=4, seed=seed)
    return [{"conversations": e.conversations, "length": len(e.conversations)} for e in episodes]


class History(TrainerCallback):
    """Keeps `training_history.json` and its plot up to date, and the best adapter so far."""

    def __init__(self, folder: Path, license: str) -> None:
        self.folder, self.license = folder, license
        self.logger = logging.getLogger("name_recall")

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logger.info("step %d %s", state.global_step, json.dumps(logs))
        write_json(self.folder / "training_history.json", state.log_history)
        plot(state.log_history, self.folder / "training.png")

    def on_evaluate(self, args, state, control, metrics=None, model=None, **kwargs):
        # What came before a resume counts too.
        earlier = [h["eval_exact"] for h in state.log_history if "eval_exact" in h and h["step"] < state.global_step]
        if metrics and metrics["eval_exact"] > max(earlier, default=-1.0):
            save(model, self.folder / "best", self.license)


class Cost(TrainerCallback):
    """Keeps `training_cost.json`: steps, those that only learn topics, and seconds; also what came before.

    The clock starts when this is made, so that reading what is told and learning topics counts. What came before is
    the run that is resumed, and the training of the adapter that `--from-adapter` names.
    """

    NAME = "training_cost.json"

    def __init__(self, folder: Path, begun_from: Path | None) -> None:
        self.path = folder / self.NAME
        self.before = self.read(begun_from) if begun_from else self.nothing()
        self.earlier, self.start = 0.0, time.perf_counter()

    @staticmethod
    def nothing() -> dict[str, float]:
        return {"steps": 0, "topic_steps": 0, "seconds": 0.0}

    @classmethod
    def read(cls, folder: Path) -> dict[str, float]:
        path = folder / cls.NAME
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else cls.nothing()

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step:  # resumed
            self.earlier = self.read(self.path.parent)["seconds"] - self.before["seconds"]

    def on_save(self, args, state, control, **kwargs):
        found = {
            "steps": self.before["steps"] + state.global_step,
            "topic_steps": self.before["topic_steps"] + args.topic_steps,
            "seconds": round(self.before["seconds"] + self.earlier + time.perf_counter() - self.start, 1),
            "threads": torch.get_num_threads(),
        }
        write_json(self.path, found)

    on_train_end = on_save


def plot(history: list[dict], path: Path) -> None:
    """Loss and validation accuracy against steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, left = plt.subplots(figsize=(7, 4))
    loss = [(h["step"], h["loss"]) for h in history if "loss" in h]
    exact = [(h["step"], h["eval_exact"]) for h in history if "eval_exact" in h]
    left.plot(*zip(*loss, strict=True), color="tab:blue", label="training loss") if loss else None
    left.set_xlabel("optimizer steps")
    left.set_ylabel("training loss", color="tab:blue")
    right = left.twinx()
    right.plot(*zip(*exact, strict=True), color="tab:orange", marker="o") if exact else None
    right.set_ylim(0, 1)
    right.set_ylabel("validation answers whose every token is right", color="tab:orange")
    figure.tight_layout()
    with whole(path) as scratch:
        figure.savefig(scratch, format="png", dpi=120)
    plt.close(figure)


def save(model: PeftModel, folder: Path, license: str) -> None:
    """The adapter alone, in bfloat16, with its card."""
    state = {name: p.detach().to(torch.bfloat16) for name, p in model.named_parameters() if p.requires_grad}
    save_adapter(
        model,
        folder,
        license=license,
        training_data="Made-up facts that a user tells of themself, from `senri_hf.tasks.training_mixture`.",
        state_dict=state,
        save_embedding_layers=False,
    )


def begin_from(model: PeftModel, adapter: Path) -> None:
    """Take over what of an adapter's weights fits, and print what of the model's it does not have."""
    weights = load_peft_weights(str(adapter), device="cpu")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Some weights of .* were not initialized")  # they are printed below
        found = set_peft_model_state_dict(model, weights, ignore_mismatched_sizes=True)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    missing = [name for name in trained if name in set(found.missing_keys)]
    if len(missing) == len(trained):
        raise SystemExit(
            f"--from-adapter {adapter}: none of its {len(weights)} weights fits an adapter of these settings; "
            "compare --memory-layers, --rank and --init with its adapter_config.json"
        )
    if missing:
        print(f"--from-adapter {adapter} has nothing that fits {len(missing)} of the {len(trained)} trained weights:")
        print(textwrap.indent("\n".join(missing), "  "))


def memory_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Settings of the adapter that are its mechanism's own."""
    if args.mechanism == "compressive":
        return {"memory_head_dim": args.memory_head_dim, "init": args.init}
    return {
        "buffer_slots": args.buffer_slots,
        "store_slots": args.store_slots,
        "z_score_threshold": args.z_score_threshold,
        "init": args.init,
        "rank": args.rank or None,
    }


def main() -> None:
    args = parse()
    is_episodic = args.mechanism == "episodic"
    if not is_episodic and (args.topic_steps or args.detach_every == 1):
        raise SystemExit(
            f"--mechanism {args.mechanism} was given with --topic-steps {args.topic_steps} and --detach-every "
            f"{args.detach_every}: it has no topics, and learns what to write from the answers of later conversations. "
            "Leave --topic-steps out, and give --detach-every at least 2"
        )
    if args.average_from is not None and not 0 <= args.average_from < 1:
        raise SystemExit(f"--average-from {args.average_from} was given, but it is a share of the steps, 0 to below 1")
    if importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("matplotlib, which draws the training's plot, is not installed: pip install 'senri_hf[plots]'")
    set_seed(args.seed)
    cost = Cost(args.checkpoint_dir, args.from_adapter)
    args.checkpoint_dir.mkdir(parents=True, exist_ok=True)
    last = get_last_checkpoint(str(args.checkpoint_dir))
    if args.resume == "last" and last is None:
        raise SystemExit(f"--resume was given, but {args.checkpoint_dir} holds no checkpoint; leave it out to begin")
    resume = last if args.resume == "last" or (args.resume is None and args.resume_if_begun) else args.resume
    args.dtype = args.dtype or dtype_of(args.checkpoint_dir, resumes=resume is not None)
    keep_settings(args, resumes=resume is not None)
    log = logging.getLogger("name_recall")
    log.setLevel(logging.INFO)
    log.addHandler(logging.FileHandler(args.checkpoint_dir / time.strftime("training_%Y%m%d_%H%M%S.log")))
    base, tokenizer = senri_hf.load_base(args.model, dtype=args.dtype)
    if not torch.cuda.is_available():
        base.set_attn_implementation(
            "eager"
        )  # for short texts forward and backward take half of fused attention's time
    layers = None if args.memory_layers == "auto" else [int(layer) for layer in args.memory_layers.split(",")]
    config = senri_hf.MemoryAdapterConfig(
        mechanism=args.mechanism, task_type="CAUSAL_LM", layers_to_transform=layers, **memory_settings(args)
    )
    model = get_peft_model(base, config)
    if args.from_adapter:
        begin_from(model, args.from_adapter)
    model.print_trainable_parameters()
    trainer = senri_hf.MemoryTrainer(
        model=model,
        args=senri_hf.MemoryTrainingArguments(
            output_dir=str(args.checkpoint_dir),
            learning_rate=args.lr,
            num_train_epochs=args.epochs,
            max_steps=args.max_steps,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=max(8, args.batch_size),
            gradient_accumulation_steps=args.grad_accum,
            eval_strategy="steps",
            eval_steps=args.eval_every,
            save_steps=args.save_every,
            save_total_limit=2,
            logging_steps=10,
            train_sampling_strategy="group_by_length",
            lr_scheduler_type="cosine",
            min_lr_ratio=args.min_lr_ratio,
            warmup_steps=args.warmup_steps,
            weight_decay=0.01,
            gate_learning_rate_multiplier=args.gate_lr_multiplier,
            reuse_told_states=is_episodic and args.detach_every == 1 and not args.read_told_live,
            detach_every=args.detach_every,
            topic_steps=args.topic_steps,
            max_grad_norm=1.0,
            bf16=args.dtype == "bfloat16",
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
            seed=args.seed,
        ),
        train_dataset=Dataset.from_list(
            training_episodes(args.task, args.num_train, args.seed, args.keep_every, args.prose_every)
        ),
        eval_dataset=Dataset.from_list(validation_episodes(args.task, args.num_val, args.seed + 1)),
        data_collator=senri_hf.EpisodeCollator(tokenizer),
        callbacks=[History(args.checkpoint_dir, args.license), cost],
    )
    if args.average_from is not None:
        trainer.add_callback(WeightAverage(args.average_from, model))
    trainer.train(resume_from_checkpoint=resume)
    if args.average_from is not None:
        trainer.evaluate()
    save(model, args.checkpoint_dir / "final", args.license)
    shutil.copy(cost.path, args.checkpoint_dir / "final" / cost.NAME)
    print(f"The adapter is in {args.checkpoint_dir / 'final'}")
    if (best := args.checkpoint_dir / "best").exists():
        print(f"The best by validation is in {best}")


if __name__ == "__main__":
    main()
