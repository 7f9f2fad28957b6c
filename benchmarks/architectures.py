"""Which decoder-only models of transformers can remember without training: the list in docs/architectures.md.

    python benchmarks/architectures.py

Every model type that `AutoModelForCausalLM` knows is built tiny, with random weights, and asked for a memory
(`MemoryCache.for_model`), which tries out whether remembered tokens are read like tokens of the context.
"""

import argparse
import contextlib
import io
import logging
import warnings
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import senri_hf
from senri_hf.files import write_text


HIDDEN, HEADS, LAYERS = 32, 4, 2
SMALL = {
    "hidden_size": HIDDEN,
    "n_embd": HIDDEN,
    "d_model": HIDDEN,
    "dim": HIDDEN,
    "embedding_size": HIDDEN,
    "word_embed_proj_dim": HIDDEN,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "ffn_dim": 64,
    "ffn_hidden_size": 64,
    "num_hidden_layers": LAYERS,
    "n_layer": LAYERS,
    "n_layers": LAYERS,
    "num_layers": LAYERS,
    "num_attention_heads": HEADS,
    "n_head": HEADS,
    "n_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rotary_dim": 4,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_top_k": 2,
    "top_k": 2,
    "n_group": 1,
    "topk_group": 1,
}
LARGEST = 20_000_000


def build(model_type: str) -> torch.nn.Module:
    """A tiny random model of a type; an error of any kind where these sizes do not make one that runs."""
    defaults = CONFIG_MAPPING[model_type]()
    text = defaults.get_text_config(decoder=True)
    known = {name: value for name, value in SMALL.items() if hasattr(text, name)}
    config = type(text)(**known) if text is not defaults else CONFIG_MAPPING[model_type](**known)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"it has {size:,} parameters even so")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        model(input_ids=torch.arange(3, 9)[None], use_cache=True)
    return model


def outcome(model_type: str) -> tuple[str, str]:
    """`served`, `refused` or `not built with these sizes`, and why."""
    try:
        model = build(model_type)
    except Exception as error:
        return "not built with these sizes", f"{type(error).__name__}: {error}".splitlines()[0][:100]
    try:
        memory = senri_hf.MemoryCache.for_model(model, slots=8)
    except ValueError as error:
        return "refused", str(error).split("without training: ")[-1].split(". A memory adapter")[0].splitlines()[0][
            :140
        ]
    layouts = [layout for layout in memory.attention_memory.layouts if layout is not None]
    turned = {f"{layout.rotated} of {layout.key_size} channels" if layout.rotated else "none" for layout in layouts}
    return "served", "positions: " + ", ".join(sorted(turned))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/architectures.md"))
    parser.add_argument("--types", nargs="*", default=sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    found: dict[str, list[str]] = {"served": [], "refused": [], "not built with these sizes": []}
    for model_type in tqdm(args.types):
        with contextlib.redirect_stdout(io.StringIO()):
            kind, why = outcome(model_type)
        found[kind].append(f"| `{model_type}` | {why.replace('|', ' ')} |")
    lines = [
        "# Memory without training, by architecture",
        "",
        "Written by `python benchmarks/architectures.py`: every model type of `AutoModelForCausalLM`, tiny and random.",
        "Served means that remembered tokens gave the logits of tokens in the context.",
    ]
    for kind, rows in found.items():
        lines += ["", f"## {kind.capitalize()}: {len(rows)}", "", "| model type | |", "|---|---|", *rows]
    write_text(args.output, "\n".join(lines) + "\n")
    print({kind: len(rows) for kind, rows in found.items()})


if __name__ == "__main__":
    main()
