"""Cost of memory beside peers in the same run: decoding, writing, reading, a training step beside LoRA's, an import.

    python benchmarks/speed.py --model smollm2-135m-instruct

Medians; the peers take turns within every round, so that a slow moment of the machine hits all of them. Decoding, whose
peers differ little, has many short turns, and its ratio is the median of those within rounds, with their quartiles.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from adapter_digest import adapter_digest
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from tqdm import trange

import senri_hf
from senri_hf.commands.chat import shipped_adapter
from senri_hf.files import write_json
from senri_hf.tasks import recall_episodes
from senri_hf.training import EpisodeCollator, tell
from senri_hf.training.episodes import IGNORED, learned_columns
from senri_hf.training.trainer import model_inputs


ROUNDS = 7
DECODING_ROUNDS = 24
NEW_TOKENS = 64  # two rounds of what decoding writes together


def seconds_in_turns(rounds: int, **runs: Callable[[], Any]) -> dict[str, list[float]]:
    """Seconds of every run in every round, after one round to warm up; every other round goes the other way."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for index in trange(rounds + 1, desc=" / ".join(runs), leave=False):
        for name, run in list(runs.items())[:: 1 if index % 2 else -1]:
            start = time.perf_counter()
            run()
            if index:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def in_turns(rounds: int, **runs: Callable[[], Any]) -> dict[str, float]:
    """Median seconds of every run."""
    return {name: median(values) for name, values in seconds_in_turns(rounds, **runs).items()}


@torch.no_grad()
def decoding(name: str, adapter: str | None, dtype: str) -> dict[str, float]:
    """Milliseconds per decoded token: the bare base, and the same with a memory of ten facts, read and written."""
    bare, tokenizer = senri_hf.load_base(name, dtype=dtype)
    model = with_adapter(name, adapter, dtype)
    told = recall_episodes(1, split="validation", facts=10, seed=3)[0].told
    memory = tell(model, tokenizer, [told])
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Tell me something about the sea."}],
        add_generation_prompt=True,
        return_tensors="pt",
    )["input_ids"]
    options = {"do_sample": False, "min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
    found = seconds_in_turns(
        DECODING_ROUNDS,
        base=lambda: bare.generate(prompt, **options),
        memory=lambda: model.generate(prompt, past_key_values=memory.snapshot(), **options),
    )
    ratios = [memory / base for base, memory in zip(found["base"], found["memory"], strict=True)]
    lower, middle, upper = quantiles(ratios, n=4)
    return {
        "base ms per token": median(found["base"]) / NEW_TOKENS * 1e3,
        "memory ms per token": median(found["memory"]) / NEW_TOKENS * 1e3,
        "ratio": middle,
        "lower quartile of ratios": lower,
        "upper quartile of ratios": upper,
    }


@torch.no_grad()
def reading_and_writing(name: str, adapter: str | None, dtype: str) -> dict[str, float]:
    """Milliseconds per token of a 512-token conversation: the base alone, written, and read and written."""
    model = with_adapter(name, adapter, dtype)
    ids = torch.randint(100, 5000, (1, 512))
    blank = senri_hf.MemoryCache.for_model(model)
    full = blank.snapshot()
    model(ids.flip(1), past_key_values=full)
    full.clear_context()

    def read(memory: senri_hf.MemoryCache | None) -> None:
        cache = None if memory is None else memory.snapshot()
        model(ids, past_key_values=cache, logits_to_keep=1)
        if cache is not None:
            cache.clear_context()

    found = in_turns(ROUNDS, base=lambda: read(None), written=lambda: read(blank), both=lambda: read(full))
    per_token = {name: seconds / ids.shape[1] * 1e3 for name, seconds in found.items()}
    return {
        "base ms per token": per_token["base"],
        "ms per written token": per_token["written"] - per_token["base"],
        "ms per read token": per_token["both"] - per_token["written"],
        "memory bytes": full.nbytes,
    }


def training_step(name: str, adapter: str | None, dtype: str) -> dict[str, float]:
    """Seconds of a step on the same labelled conversations: this adapter, with what it was told, beside LoRA.

    Both compute logits where there are labels only. What is told is read anew, as in the first pass over the data.
    """
    base, tokenizer = senri_hf.load_base(name, dtype=dtype)
    lora = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    model = with_adapter(name, adapter, dtype, trained=True)
    episodes = recall_episodes(8, split="train", facts=2, seed=1)
    batch = EpisodeCollator(tokenizer)([{"conversations": episode.conversations} for episode in episodes])[
        "conversations"
    ]
    trainer = senri_hf.MemoryTrainer(
        model=model,
        args=senri_hf.MemoryTrainingArguments(
            output_dir=tempfile.mkdtemp(), use_cpu=not torch.cuda.is_available(), report_to="none"
        ),
    )
    told, labelled = batch[:-1], batch[-1]
    columns = learned_columns(labelled["labels"] != IGNORED)

    def memory_step() -> None:
        loss, _ = trainer.run_episodes(model.train(), batch)
        loss.backward()

    def lora_step() -> None:
        logits = lora.train()(**model_inputs(labelled), logits_to_keep=columns).logits.float()
        target = labelled["labels"][:, columns + 1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORED).backward()

    @torch.no_grad()
    def read_told() -> None:
        for conversation in told:
            lora(**model_inputs(conversation), logits_to_keep=1)

    found = in_turns(3, memory=memory_step, lora=lora_step, told=read_told)
    return {
        "memory seconds, what is told read anew": found["memory"],
        "LoRA seconds, the labelled conversations alone": found["lora"],
        "LoRA seconds, what is told read too": found["lora"] + found["told"],
        "ratio to LoRA with what is told": found["memory"] / (found["lora"] + found["told"]),
        "ratio to LoRA without": found["memory"] / found["lora"],
        "memory parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "LoRA parameters": sum(p.numel() for p in lora.parameters() if p.requires_grad),
    }


def importing() -> dict[str, float]:
    """Seconds of a new process that imports transformers, and of one that imports the package beside it."""

    def process(module: str) -> Callable[[], Any]:
        return lambda: subprocess.run([sys.executable, "-c", f"import {module}"], check=True)

    found = in_turns(ROUNDS, transformers=process("transformers"), both=process("transformers, senri_hf"))
    return {
        "transformers, seconds": found["transformers"],
        "transformers and senri_hf, seconds": found["both"],
        "ratio": found["both"] / found["transformers"],
    }


def with_adapter(name: str, adapter: str | None, dtype: str, trained: bool = False) -> PeftModel:
    base, _ = senri_hf.load_base(name, dtype=dtype)
    if adapter:
        return PeftModel.from_pretrained(base, adapter, is_trainable=trained).eval()
    return get_peft_model(base, senri_hf.MemoryAdapterConfig(task_type="CAUSAL_LM")).eval()


def setting(adapter: str | None, dtype: str) -> dict[str, str | int]:
    """What was timed."""
    config = senri_hf.MemoryAdapterConfig() if adapter is None else PeftConfig.from_pretrained(adapter)
    return {
        "adapter": "untrained" if adapter is None else adapter_digest(adapter),
        "memory layers": str(config.layers_to_transform),
        "rank": config.rank,
        "slots of buffer and store": f"{config.buffer_slots} + {config.store_slots}",
        "dtype": dtype,
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--adapter", help="folder of a trained adapter; the shipped one, if there is one, without it")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path, default=Path("docs/speed.json"))
    arguments = parser.parse_args()
    if arguments.adapter is None:
        arguments.adapter = shipped_adapter(arguments.model)
    torch.manual_seed(0)
    result = {
        "setting": setting(arguments.adapter, arguments.dtype),
        "decoding": decoding(arguments.model, arguments.adapter, arguments.dtype),
        "a conversation of 512 tokens": reading_and_writing(arguments.model, arguments.adapter, arguments.dtype),
        "training step": training_step(arguments.model, arguments.adapter, arguments.dtype),
        "import": importing(),
    }
    stored = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    stored[arguments.model] = result
    write_json(arguments.output, stored)
    print(json.dumps(result, indent=1))
