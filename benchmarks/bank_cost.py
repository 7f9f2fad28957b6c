"""What a bank costs: the time of a training pass against the rows that the bank holds.

    python benchmarks/bank_cost.py                      # writes docs/bank_cost.json

Every token reads `top_k` chapters of `rows` rows each, whatever the bank holds. Timed is a forward and backward pass of
a memory transformer, gradients of the whole bank included, but no optimizer step (its time is that of an embedding
table's), in seconds of one processor. Beside it stands what an embedding table of as many rows takes of that: the rows
that some token read are looked up once for every memory layer, and get their dense gradient. Sizes take turns, so that
a busy machine slows all of them alike, and the fastest pass of each counts.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from senri_hf import MemoryTransformerConfig, MemoryTransformerForCausalLM
from senri_hf.files import write_json
from senri_hf.memory.bank_reader import BankAttention


HIDDEN, LAYERS, TOKENS, CHAPTER, TOP_K = 128, 8, 2048, 256, 2
SIZES = (4096, 16384, 65536, 262144)
STRATEGIES = ("prefix", "token")


def model_of(rows: int, strategy: str, seed: int = 0) -> MemoryTransformerForCausalLM:
    """A model whose memory is every fourth layer's."""
    torch.manual_seed(seed)
    config = MemoryTransformerConfig(
        vocab_size=2048, hidden_size=HIDDEN, intermediate_size=4 * HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=4, memory_layer_placement="every_n", memory_layer_n=4, wo_init_zero=False,
        num_memory_tokens=rows, use_chapters=True, num_chapters=rows // CHAPTER, top_k_chapters=TOP_K,
        routing_strategy_train=strategy, memory_gradient_checkpointing=False,
    )  # fmt: skip
    return MemoryTransformerForCausalLM(config).train()


def one_pass(model: MemoryTransformerForCausalLM, ids: torch.Tensor) -> float:
    """Seconds of the processor for a forward and backward pass."""
    model.zero_grad(set_to_none=True)
    start = time.process_time()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return time.process_time() - start


def rows_read(model: MemoryTransformerForCausalLM, ids: torch.Tensor) -> list[torch.Tensor]:
    """The numbers of the rows that some token read, for every memory layer."""
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    layers = [module for module in model.modules() if isinstance(module, BankAttention)]
    chapters = [layer.record.usage.nonzero() for layer in layers if layer.record is not None]
    return [(read * CHAPTER + torch.arange(CHAPTER)).flatten() for read in chapters]


def table_pass(table: torch.nn.Embedding, read: list[torch.Tensor]) -> float:
    """Seconds of the processor for looking rows up in a table, and its gradient."""
    table.zero_grad(set_to_none=True)
    start = time.process_time()
    torch.stack([table(rows).sum() for rows in read]).sum().backward()
    return time.process_time() - start


def times(rounds: int) -> list[dict[str, float | int | str]]:
    """Seconds for every strategy and size, and as multiples of the smallest size's."""
    ids = torch.randint(0, 2048, (TOKENS // 512, 512), generator=torch.Generator().manual_seed(1))
    results: list[dict[str, float | int | str]] = []
    for strategy in STRATEGIES:
        models = {rows: model_of(rows, strategy) for rows in SIZES}
        read = {rows: rows_read(model, ids) for rows, model in models.items()}
        tables = {rows: torch.nn.Embedding(rows, HIDDEN) for rows in SIZES}
        seconds: dict[int, list[tuple[float, float]]] = {rows: [] for rows in SIZES}
        for turn in range(rounds + 1):
            for rows, model in models.items():
                taken = one_pass(model, ids), table_pass(tables[rows], read[rows])
                if turn:  # the first warms up
                    seconds[rows].append(taken)
        best = {rows: [min(times) for times in zip(*turns, strict=True)] for rows, turns in seconds.items()}
        whole, table = best[SIZES[0]]
        for rows, (taken, looked_up) in best.items():
            found = {
                "strategy": strategy,
                "rows": rows,
                "seconds": taken,
                "times": taken / whole,
                "table_seconds": looked_up,
                "times_without_table": (taken - looked_up) / (whole - table),
                "rows_read": sum(len(index) for index in read[rows]) / len(read[rows]) / rows,
            }
            results.append(found)
            print(json.dumps(found), flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="timed passes of every size")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs" / "bank_cost.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    setting = {
        "hidden_size": HIDDEN, "layers": LAYERS, "memory_layers": LAYERS // 4, "tokens": TOKENS,
        "rows_per_chapter": CHAPTER, "top_k": TOP_K, "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    write_json(arguments.out, {"setting": setting, "time": times(arguments.rounds)})


if __name__ == "__main__":
    main()
