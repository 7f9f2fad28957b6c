"""Pretrain a small Senri on Japanese text, beside a model of attention only of the same size and tokens.

    python examples/senri_japanese/pretrain.py --text FOLDER      # writes checkpoints/ and docs/senri_japanese.json

A row is four segments. After each the context is cleared, as between conversations: attention sees one segment, memory
all that came before in the row, and the gradient flows through it. The held-out chapter is scored segment by segment,
with the memory carried through the whole chapter and with an empty one each time.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from japanese import split, train_tokenizer
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed

from senri_hf import MemoryCache, SenriConfig, SenriForCausalLM, pythia_layers, senri_layers
from senri_hf.files import write_json


ROOT = Path(__file__).parents[2]
SEGMENT, SEGMENTS, VOCABULARY, WIDTH, LAYERS = 128, 4, 2048, 128, 4
MODELS = {
    "senri delta": lambda: senri_layers(1) + pythia_layers(LAYERS - 1),
    "senri gated_delta": lambda: (
        senri_layers(1, update_rule="gated_delta", memory_head_dim=64) + pythia_layers(LAYERS - 1)
    ),
    "attention only": lambda: pythia_layers(LAYERS),
}
PROMPTS = ("Debian では、", "パッケージを", "次のコマンドは")


class SegmentTrainer(Trainer):
    """A `Trainer` for rows of several segments, between which the context is cleared and the memory stays."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        losses = segment_losses(model, inputs["input_ids"], carried=True)
        loss = torch.stack(losses).mean()
        return (loss, None) if return_outputs else loss


def segment_losses(model: Any, ids: torch.Tensor, *, carried: bool) -> list[torch.Tensor]:
    """The mean loss of every segment of ids [B, T]; a model without memory reads each by itself."""
    remembers = "senri_memory" in model.config.layer_types
    memory = MemoryCache.for_model(model) if remembers else None
    losses = []
    for segment in ids.split(SEGMENT, dim=1):
        losses.append(model(segment, labels=segment, past_key_values=memory, use_cache=remembers).loss)
        if memory is not None:
            memory.clear_context()
            if not carried:
                memory.reset_memory()
    return losses


def rows_of(text: str, tokenizer: PreTrainedTokenizerBase, length: int) -> torch.Tensor:
    """The text's tokens in rows [N, length]; what does not fill a row is left out."""
    ids = torch.tensor(tokenizer(text, return_attention_mask=False)["input_ids"])
    return ids[: len(ids) // length * length].view(-1, length)


@torch.no_grad()
def perplexity(model: Any, ids: torch.Tensor, *, carried: bool) -> float:
    """Perplexity of a text [1, T], every segment's first token left out."""
    return math.exp(torch.stack(segment_losses(model.eval(), ids, carried=carried)).mean().item())


def samples(model: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """What the model writes after each prompt, with a seed of its own."""
    written = {}
    for prompt in PROMPTS:
        torch.manual_seed(0)
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        out = model.generate(**inputs, max_new_tokens=40, do_sample=True, temperature=0.7, top_k=30)
        written[prompt] = tokenizer.decode(out[0], skip_special_tokens=True)
    return written


def run(name: str, seed: int, text: str, held_out: str, tokenizer: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Train one model; what it scored and wrote."""
    set_seed(seed)
    model = SenriForCausalLM(
        SenriConfig(
            layers=MODELS[name](), vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=4 * WIDTH,
            num_attention_heads=4, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    folder = args.checkpoints / f"{name.replace(' ', '-')}-{seed}"
    settings = TrainingArguments(
        output_dir=str(folder), max_steps=args.steps, per_device_train_batch_size=8, learning_rate=3e-3,
        lr_scheduler_type="cosine", warmup_steps=20, logging_steps=25, save_strategy="no", report_to=[],
        disable_tqdm=True, seed=seed, data_seed=seed, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in rows_of(text, tokenizer, SEGMENT * SEGMENTS)]
    trainer = SegmentTrainer(model=model, args=settings, train_dataset=data)
    trained = trainer.train()
    ids = rows_of(held_out, tokenizer, SEGMENT).view(1, -1).to(model.device)
    scores = {"empty memory": perplexity(model, ids, carried=False)}
    if name != "attention only":
        scores["carried memory"] = perplexity(model, ids, carried=True)
    found = {
        "seed": seed,
        "parameters": model.num_parameters(),
        "tokens": args.steps * 8 * SEGMENT * SEGMENTS,
        "training loss": trained.training_loss,
        "perplexity": scores,
        "samples": samples(model, tokenizer),
    }
    card = {
        "training_data": "The Debian Reference in Japanese, chapters 1 to 12 without 10.",
        "settings": {"steps": args.steps, "seed": seed, "segment": SEGMENT, "segments of a row": SEGMENTS},
        "results": {f"perplexity of chapter 10, {what}": value for what, value in scores.items()},
    }
    model.save_pretrained(folder, card=card)
    tokenizer.save_pretrained(folder)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="folder that debian-reference-ja was unpacked into")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--checkpoints", type=Path, default=ROOT / "checkpoints" / "senri_japanese")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "senri_japanese.json")
    args = parser.parse_args()
    text, held_out = split(args.text)
    tokenizer = train_tokenizer(text.splitlines(), VOCABULARY)
    found = json.loads(args.output.read_text()) if args.output.exists() else {}
    for seed in args.seeds:
        for name in args.models:
            found[f"{name}, seed {seed}"] = run(name, seed, text, held_out, tokenizer, args)
            write_json(args.output, found)
            print(name, found[f"{name}, seed {seed}"]["perplexity"], flush=True)


if __name__ == "__main__":
    main()
