"""A passkey in noise: told once, asked for up to a million tokens later, of a model that was trained on short texts.

    python benchmarks/passkey.py                      # trains, asks, writes docs/passkey.json and docs/passkey.png

The model is memory layers only (`gated_delta`), so that nothing but memory reaches from the telling to the asking. It
is trained with the task `senri_hf.tasks.Passkey` on texts of up to 2,048 tokens, read whole. It is asked on longer
ones, read in pieces of 1,024 tokens: after each piece the context is cleared, and memory goes on (`carried`), or is
reset too (`reset`). A key counts as right when all of its digits are the likeliest tokens. Depth is where the key is
told, as a share of the text; it is never told in the last piece, and at 0.25 always across the end of a piece, where
the convolution before the memory starts anew. Training goes on where it stopped, and lengths that are in the file are
not asked again.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from senri_hf import MemoryCache, SenriConfig, SenriForCausalLM, senri_layers
from senri_hf.files import whole, write_json
from senri_hf.tasks import Passkey


ROOT = Path(__file__).parents[1]
VOCABULARY, DIGITS, WIDTH, HEAD, LAYERS = 64, 5, 64, 32, 2
# Lengths of texts in equal parts of the training, and tokens of a step.
CURRICULUM, TOKENS = (24, 48, 96, 256, 512, 1024, 2048, 2048), 8192
PIECE = 1024
DEPTHS = (0.0, 0.2, 0.25, 0.45, 0.7)
# Tokens of a text that is asked about, and how many such texts for each depth.
ASKED = {4096: 20, 16384: 10, 65536: 4, 262144: 2, 1048576: 1}


class Texts(Dataset[dict[str, Tensor]]):
    """The batch of every step: as many texts as make `TOKENS` tokens."""

    def __init__(self, steps: int, seed: int) -> None:
        self.steps, self.seed = steps, seed

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        longest = CURRICULUM[len(CURRICULUM) * step // self.steps]
        generator = torch.Generator().manual_seed(self.seed * 10**6 + step)
        ids, labels = Passkey(longest, DIGITS, VOCABULARY).batch(TOKENS // longest, None, generator)
        return {"input_ids": ids, "labels": labels}


def build() -> SenriForCausalLM:
    layers = senri_layers(LAYERS, update_rule="gated_delta", memory_head_dim=HEAD)
    return SenriForCausalLM(
        SenriConfig(
            layers=layers, vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_attention_heads=2
        )
    )


def train(folder: Path, steps: int, rate: float, seed: int) -> tuple[SenriForCausalLM, dict[str, Any]]:
    """The trained model and what its training was; read from `folder` where it was finished before."""
    history, weights = folder / "training.json", folder / "model.safetensors"
    set_seed(seed)
    model = build()
    if history.exists():
        model.load_state_dict(load_file(weights))
        return model.eval(), json.loads(history.read_text())
    settings = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=1, learning_rate=rate,
        lr_scheduler_type="cosine", warmup_steps=50, logging_steps=50, save_steps=200, save_total_limit=1,
        report_to=[], seed=seed, train_sampling_strategy="sequential", use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    trainer = Trainer(
        model=model, args=settings, train_dataset=Texts(steps, seed), data_collator=lambda items: items[0]
    )
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.exists() else None)
    model.save_pretrained(folder)
    found = {
        "steps": steps,
        "tokens a step": TOKENS,
        "rate": rate,
        "parameters": model.num_parameters(),
        "seconds since it was last begun": round(time.perf_counter() - start, 1),
        "loss by step": {h["step"]: round(h["loss"], 4) for h in trainer.state.log_history if "loss" in h},
    }
    write_json(history, found)
    return model.eval(), found


@torch.no_grad()
def ask(model: SenriForCausalLM, length: int, copies: int, seed: int, *, carried: bool) -> dict[str, Any]:
    """Whole keys that are right by depth, the share of digits, and bytes of memory.

    All depths are rows of one batch. Where memory is reset, the last piece is all that counts, and all that is read.
    """
    generator = torch.Generator().manual_seed(10**8 + seed)
    texts = [Passkey(length, DIGITS, VOCABULARY).batch(copies, depth, generator) for depth in DEPTHS]
    ids, labels = (torch.cat(parts) for parts in zip(*texts, strict=True))
    pieces = ids.split(PIECE, dim=1)
    memory, sizes, start = MemoryCache.for_model(model), set(), time.perf_counter()
    for piece in tqdm(pieces[:-1] if carried else (), desc=f"{length:,} tokens", leave=False):
        model(piece, past_key_values=memory, logits_to_keep=1)
        memory.clear_context()
        sizes.add(memory.nbytes)
    logits = model(pieces[-1], past_key_values=memory, logits_to_keep=DIGITS + 1).logits[:, :-1]
    right = (logits.argmax(-1) == labels[:, -DIGITS:]).view(len(DEPTHS), copies, DIGITS)
    sizes.add(memory.nbytes)
    return {
        "right": dict(zip(map(str, DEPTHS), right.all(-1).float().mean(1).tolist(), strict=True)),
        "digits": right.float().mean().item(),
        "texts of a depth": copies,
        "bytes of memory of a row": sorted(size // len(ids) for size in sizes),
        "seconds": round(time.perf_counter() - start, 1),
    }


def plot(found: dict[str, Any], path: Path) -> None:
    """Right keys against the length of the text, one line for every depth, and digits with a memory that is reset."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    lengths = sorted(map(int, found["carried"]))
    for depth in map(str, DEPTHS):
        axes.plot(lengths, [found["carried"][str(n)]["right"][depth] for n in lengths], marker="o", label=f"at {depth}")
    reset = [found["reset"][str(n)]["digits"] for n in lengths]
    axes.plot(lengths, reset, "k:", marker="x", label="memory reset: digits")
    axes.set_xscale("log", base=2)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("tokens of the text")
    axes.set_ylabel("keys that are right")
    axes.axvline(max(CURRICULUM), color="gray", linewidth=0.8)
    axes.legend(title="told")
    figure.tight_layout()
    with whole(path) as scratch:
        figure.savefig(scratch, format="png", dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--lengths", type=int, nargs="+", choices=ASKED, default=list(ASKED))
    parser.add_argument("--checkpoints", type=Path, default=ROOT / "checkpoints" / "passkey")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "passkey.json")
    args = parser.parse_args()
    results = json.loads(args.output.read_text()) if args.output.exists() else {}
    for seed in args.seeds:
        name = f"seed {seed}, {args.steps} steps, rate {args.rate:g}"
        model, training = train(
            args.checkpoints / name.replace(", ", "-").replace(" ", "_"), args.steps, args.rate, seed
        )
        found = results.setdefault(name, {"carried": {}, "reset": {}})
        found["training"] = training
        for kind in ("carried", "reset"):  # those of other depths are asked anew
            asked = found[kind].items()
            found[kind] = {n: of for n, of in asked if list(of["right"]) == list(map(str, DEPTHS))}
        for length in args.lengths:
            for kind in ("carried", "reset"):
                if str(length) not in found[kind]:
                    found[kind][str(length)] = ask(model, length, ASKED[length], seed, carried=kind == "carried")
                    write_json(args.output, results)
                print(f"{name}, {length:,} tokens, memory {kind}: {found[kind][str(length)]}", flush=True)
        plot(found, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
