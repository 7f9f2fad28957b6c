"""What Senri costs as the text grows: a model of memory layers only beside a GPT-NeoX of the same size.

    python benchmarks/senri_cost.py                     # writes docs/senri_cost.json
    python benchmarks/senri_cost.py --models delta      # one model, beside what the file says of the others

Every figure is of a process of its own: processor seconds of one thread for reading the text in pieces of 2,048 tokens
(as `generate(prefill_chunk_size=2048)` does) and for decoding after it, bytes of state (memory, or keys and values),
and how much the peak of resident memory grew.
Weights are random. Lengths take turns, so that a busy machine slows all of them alike, and the fastest round counts.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, GPTNeoXConfig, GPTNeoXForCausalLM

from senri_hf import MemoryCache, SenriConfig, SenriForCausalLM, senri_layers
from senri_hf.files import write_json


OUTPUT = Path(__file__).parents[1] / "docs" / "senri_cost.json"
SIZES = {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4}
LAYERS, PIECE, NEW = 4, 2048, 24
MODELS = ("gated_delta", "delta", "attention")
LENGTHS = {name: (1024, 8192, 32768, 65536) for name in MODELS} | {"attention": (1024, 8192, 32768)}


def build(name: str) -> Any:
    torch.manual_seed(0)
    if name == "attention":
        return GPTNeoXForCausalLM(
            GPTNeoXConfig(**SIZES, num_hidden_layers=LAYERS, max_position_embeddings=65536 + 1024, rotary_pct=0.25)
        ).eval()
    layers = senri_layers(LAYERS, update_rule=name, memory_head_dim=64)
    return SenriForCausalLM(SenriConfig(**SIZES, layers=layers)).eval()


@torch.no_grad()
def measure(name: str, length: int) -> dict[str, float]:
    """Processor seconds a token, bytes of state, and how much the peak of memory grew."""
    torch.set_num_threads(1)
    model = build(name)
    cache: Any = DynamicCache(config=model.config) if name == "attention" else MemoryCache.for_model(model)
    ids = torch.randint(0, 4096, (1, length), generator=torch.Generator().manual_seed(1))
    model(ids[:, :PIECE], logits_to_keep=1)  # what reading takes once stays out of what is timed
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    for piece in ids.split(PIECE, dim=1):
        model(piece, past_key_values=cache, logits_to_keep=1)
    prefill = time.process_time() - start
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    one, steps = ids[:, :1], []
    for _ in range(NEW):
        start = time.process_time()
        model(one, past_key_values=cache)
        steps.append(time.process_time() - start)
    if name == "attention":
        state = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    else:
        state = cache.nbytes
    return {
        "prefill, microseconds a token": 1e6 * prefill / length,
        "decoding, milliseconds a token": 1e3 * sorted(steps)[len(steps) // 4],
        "bytes of state": state,
        "peak of memory grew by, MB": grown / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "TOKENS"), help="measure this alone and print it")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], int(args.one[1]))))
        return
    found: dict[str, dict[str, dict[str, float]]]
    found = json.loads(args.output.read_text()) if args.output.exists() else {}
    found.update({name: {} for name in args.models})
    for turn in range(args.rounds):
        for name in args.models:
            for length in LENGTHS[name]:
                command = [sys.executable, __file__, "--one", name, str(length)]
                out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                new, held = json.loads(out), found[name].get(str(length))
                found[name][str(length)] = new if held is None else {key: min(new[key], held[key]) for key in new}
                print(turn, name, length, new, flush=True)
                write_json(args.output, found)


if __name__ == "__main__":
    main()
