"""What a trained bank does: which chapters fire for which text, and what holding it in few bits costs.

    python examples/memory_comparison/compare.py scratch      # trains the models; and smollm2
    python examples/memory_comparison/trained.py              # writes docs/bank_trained.json

Texts are the held-out tenths of books, of which the memory was trained on one, documentation, and chats. Chapters are
those of the memory in a model that exists at its best rate, layer by layer. Bits are those of banks that were trained
in 32 and made codes afterwards.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from compare import OUT, PARTS, best_folder, held_out

from senri_hf.adapters import quantize_bank
from senri_hf.files import write_json
from senri_hf.memory.bank import MemoryBank
from senri_hf.memory.bank_reader import BankAttention
from senri_hf.tasks.text import TEXT_SOURCES
from senri_hf.training import run as runs
from senri_hf.training.data import load_rows, pack_texts


ROWS, BATCH = 16, 4
CHAPTERED = ("smollm2", "memory")
QUANTIZED = [("scratch", "memory 1024"), ("scratch", "memory 256, 4 of 16 chapters"), ("smollm2", "memory")]


def texts(run: runs.Run) -> dict[str, torch.Tensor]:
    """Tokens [rows, length] of every kind of text."""
    documents = {source: load_rows("ordinary_text", source, "test") for source in TEXT_SOURCES}
    said = [" ".join(m["content"] for m in row["messages"]) for row in load_rows("recall", None, "test")]
    documents["chats about people"] = [{"text": text} for text in said]
    length = run.config.training.max_length
    packed = {name: pack_texts(rows, run.tokenizer, "text", length)[:ROWS] for name, rows in documents.items()}
    return {name: torch.tensor([row["input_ids"] for row in rows]) for name, rows in packed.items()}


@torch.no_grad()
def routing(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Shares [layers, chapters] of the reads of a text, and entropies [layers] of a token's distribution, in nats."""
    readers = [module for module in model.modules() if isinstance(module, BankAttention)]
    usage, entropy = [], []
    for batch in ids.split(BATCH):
        model(input_ids=batch, use_cache=False)
        records = [reader.record for reader in readers if reader.record is not None]
        usage += [torch.stack([record.usage for record in records])] * len(batch)
        entropy += [torch.stack([record.entropy for record in records])] * len(batch)
    return torch.stack(usage).mean(0), torch.stack(entropy).mean(0)


def mutual_information(usage: torch.Tensor) -> torch.Tensor:
    """How much a read's chapter says of the text it is made in, where texts are equally long: nats, [layers].

    Args:
        usage: [texts, layers, chapters]
    """
    return torch.xlogy(usage, usage / usage.mean(0).clamp_min(1e-12)).sum(-1).mean(0)


def chapters(out: Path) -> dict[str, Any]:
    """Usage and entropy by text and layer, and how both went in training."""
    folder = best_folder(out, *CHAPTERED)
    run = runs.load_checkpoint(folder / runs.FINAL)
    found = {name: routing(run.model, ids) for name, ids in texts(run).items()}
    usage = torch.stack([of_text for of_text, _ in found.values()])
    state = json.loads(next(folder.glob("checkpoint-*/trainer_state.json")).read_text())
    logged = ("step", "router_entropy", "busiest_chapter")
    return {
        "variant": CHAPTERED[1],
        "layers": run.config.memory.layers(run.model.config.num_hidden_layers),
        "read": run.config.memory.top_k_chapters,
        "trained_on": run.config.training.dataset_subset,
        "tokens_of_a_text": ROWS * run.config.training.max_length,
        "usage": {name: of_text.tolist() for name, (of_text, _) in found.items()},
        "entropy": {name: entropy.tolist() for name, (_, entropy) in found.items()},
        "mutual_information": mutual_information(usage).tolist(),
        "training": [{key: entry[key] for key in logged} for entry in state["log_history"] if "loss" in entry],
    }


@torch.no_grad()
def leave_memory_out(model: Any) -> None:
    """Have a trained model read nothing, so that what its memory adds to the loss is seen."""
    for module in model.modules():
        if isinstance(module, BankAttention):
            for parameter in module.o_proj.parameters():
                parameter.zero_()


def bits(out: Path) -> list[dict[str, Any]]:
    """Bytes of a model's banks and its loss on what was held out, by bits, 0 for no memory; of the models there are."""
    compared = {(part, run["variant"]) for part, found in json.loads(out.read_text()).items() for run in found["runs"]}
    found = []
    for part, variant in [one for one in QUANTIZED if one in compared]:
        for held in (32, 8, 4, 0):
            run = runs.load_checkpoint(best_folder(out, part, variant) / runs.FINAL)
            if held == 0:
                leave_memory_out(run.model)
            elif held < 32 and part == "smollm2":
                quantize_bank(run.model, held)
            elif held < 32:
                run.model.quantize_memory(held)
            size = sum(module.nbytes for module in run.model.modules() if isinstance(module, MemoryBank))
            loss = held_out(run, PARTS[part])["loss"]
            found.append({"part": part, "variant": variant, "bits": held, "bytes": size, "loss": loss})
            print(f"{part}, {variant}: {held} bits, {size:,} bytes, loss {loss:.6f}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=OUT, help="what compare.py wrote")
    parser.add_argument("--out", type=Path, default=OUT.with_name("bank_trained.json"))
    arguments = parser.parse_args()
    found = {"chapters": chapters(arguments.runs), "bits": bits(arguments.runs)}
    write_json(arguments.out, found)


if __name__ == "__main__":
    main()
