"""Which decoder-only models of transformers can remember without training: the list in docs/architectures.md.

    python benchmarks/architectures.py

Every model type that `AutoModelForCausalLM` knows is built tiny, with random weights and layers of every kind that it
has, and asked for a memory (`MemoryCache.for_model`), which tries out whether remembered tokens are read like tokens of
the context.
"""

import argparse
import contextlib
import io
import logging
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

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
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "num_heads": HEADS,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 256,
    "sliding_window": 6,
    "window_size": 6,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "shared_intermediate_size": 16,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
}
ROTARY = {"rope_type": "default", "rope_theta": 10_000.0}
SLIDING = ["sliding_attention", "full_attention"]
# What a config class has no defaults for.
NEEDED: dict[str, dict[str, Any]] = {
    "tensor_memory": {
        "vocab_size": 64,
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "layers": [[{"dim": 8, "eps": 1e-6, "use_delta_rule": True}]] * LAYERS,
        "bias": True,
        "normalize_qkv": False,
    }
}
# What a type needs besides: two layers, one of every kind that it has, and sizes that fit each other.
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"layer_types": SLIDING, "rope_parameters": {kind: ROTARY for kind in SLIDING}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10_000.0},
        "ffn_config": {"ffn_hidden_size": 16},
    },
    "dots1": {"layer_types": SLIDING},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma2": {"layer_types": SLIDING},
    "gemma3": {"layer_types": SLIDING},
    "gemma3_text": {"layer_types": SLIDING},
    "gemma3n": {"layer_types": SLIDING * 2, "num_hidden_layers": 4, "num_kv_shared_layers": 2},
    "gemma3n_text": {"layer_types": SLIDING * 2, "num_hidden_layers": 4, "num_kv_shared_layers": 2},
    "gemma4": {"layer_types": SLIDING, "global_head_dim": 8},
    "gemma4_text": {"layer_types": SLIDING, "global_head_dim": 8},
    "gemma4_unified": {"layer_types": SLIDING, "global_head_dim": 8},
    "gemma4_unified_text": {"layer_types": SLIDING, "global_head_dim": 8},
    "git": {
        "vision_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "n_groups": 1, "state_size": 8},
    "prophetnet": {"num_hidden_layers": None, "num_decoder_layers": 2, "num_encoder_layers": 2},
    "recurrent_gemma": {"layer_types": None, "block_types": ["recurrent", "attention"]},
    "reformer": {"is_decoder": True, "attn_layers": ["local", "lsh"], "axial_pos_embds": False},
    "zamba": {
        "layer_types": None,
        "layers_block_type": ["mamba", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "attention_head_dim": 16},
    "zaya": {"num_experts_per_tok": 1},
}
LARGEST = 30_000_000


def config_of(model_type: str) -> PreTrainedConfig:
    """A tiny config of a type, with two layers or as many as it has kinds of them."""
    needed = NEEDED.get(model_type, {})
    defaults = CONFIG_MAPPING[model_type](**needed)
    text = defaults.get_text_config(decoder=True)
    # Not hasattr: some have properties of such names.
    names = {field.name for field in fields(text)} | text.attribute_map.keys()
    sizes = {name: value for name, value in SMALL.items() if name in names}
    if "kv_lora_rank" in names:  # latent attention has keys and values for every head
        sizes["num_key_value_heads"] = HEADS
    kinds = list(dict.fromkeys(getattr(text, "layer_types", None) or ()))
    if "layer_types" in names and len(kinds) > 1 and "linear_attention" in kinds:
        sizes |= {"layer_types": kinds, "num_hidden_layers": len(kinds)}
    sizes |= needed | OWN.get(model_type, {})
    config = type(text)(**{name: value for name, value in sizes.items() if value is not None})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        setattr(defaults, "decoder" if "decoder" in defaults.sub_configs else "text_config", config)
        return defaults
    return config


def build(model_type: str) -> torch.nn.Module:
    """A tiny random model of a type; an error of any kind where these sizes do not make one that runs."""
    config = config_of(model_type)
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
        "Written by `python benchmarks/architectures.py`: every model type of `AutoModelForCausalLM`, tiny and random,",
        "with a layer of every kind that its sizes let it have, and `MemoryCache.for_model(model, slots=8)` of it.",
        "Served means that remembered tokens gave the logits of tokens in the context, also in `generate()` and for a",
        "padded row. A model of other sizes and layers is tried out as it is, when it is given a memory.",
    ]
    for kind, rows in found.items():
        lines += ["", f"## {kind.capitalize()}: {len(rows)}", "", "| model type | |", "|---|---|", *rows]
    write_text(args.output, "\n".join(lines) + "\n")
    print({kind: len(rows) for kind, rows in found.items()})


if __name__ == "__main__":
    main()
