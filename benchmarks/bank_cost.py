"""What a bank costs: the time of a training pass against the rows that the bank holds.

    python benchmarks/bank_cost.py                      # writes docs/bank_cost.json

Every token reads `top_k` chapters of `rows` rows each, whatever the bank holds. Timed is a forward and backward pass of
a memory transformer, gradients of the whole bank included, but no optimizer step (its time is that of an embedding
table's), in seconds of one processor. Sizes take turns, so that a busy machine slows all of them alike, and the fastest
pass of each counts.
"""

import argparse
import time
from pathlib import Path

import torch

from senri_hf import MemoryTransformerConfig, MemoryTransformerForCausalLM
from senri_hf.files import write_json


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


def chapters_read(model: MemoryTransformerForCausalLM, ids: torch.Tensor) -> float:
    """Share of the chapters that some token read."""
    with torch.no_grad():
        return (model(input_ids=ids, use_cache=False).router_usage > 0).float().mean().item()


def times(rounds: int) -> list[dict[str, float | int | str]]:
    """Seconds for every strategy and size, and as multiples of the smallest size's."""
    ids = torch.randint(0, 2048, (TOKENS // 512, 512), generator=torch.Generator().manual_seed(1))
    results: list[dict[str, float | int | str]] = []
    for strategy in STRATEGIES:
        models = {rows: model_of(rows, strategy) for rows in SIZES}
        seconds: dict[int, list[float]] = {rows: [] for rows in SIZES}
        for turn in range(rounds + 1):
            for rows, model in models.items():
                taken = one_pass(model, ids)
                if turn:  # the first warms up
                    seconds[rows].append(taken)
        for rows, model in models.items():
            best, smallest = min(seconds[rows]), min(seconds[SIZES[0]])
            read = chapters_read(model, ids)
            results.append(
                {"strategy": strategy, "rows": rows, "seconds": best, "times": best / smallest, "chapters_read": read}
            )
            print(f"{strategy:7} {rows:7} rows: {best:.3f} s, {best / smallest:.2f} times, {read:.0%} read", flush=True)
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
