"""`senri-hf merge`: LoRA into the base model, and quantized copies of banks."""

import argparse
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `merge` to the command line."""
    parser = commands.add_parser("merge", help="merge LoRA into the base model, quantize banks")
    parser.add_argument("--checkpoint", required=True, metavar="FOLDER", help="what train wrote")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the copy goes")
    parser.add_argument("--quantize", type=int, choices=(4, 8), metavar="BITS", help="hold banks in 4 or 8 bits")
    parser.set_defaults(run=run_merge)


def run_merge(arguments: argparse.Namespace) -> int:
    """Write a copy in which LoRA is a part of the base model; memory stays an adapter. All is safetensors."""
    from ..training import run as runs
    from ..training.language_model import name_base

    out = Path(arguments.out)
    if out.exists():
        raise OSError(f"{out} exists already; name a new folder")
    run = runs.load_checkpoint(arguments.checkpoint)
    if arguments.quantize is not None and not run.config.memory.has_memory:
        raise ValueError(f"--quantize {arguments.quantize} was given, but {arguments.checkpoint} has no bank")
    merges = run.config.model.base_model_name is not None and run.config.memory.has_lora
    if not merges and arguments.quantize is None:
        raise ValueError(f"There is nothing to do: {arguments.checkpoint} has no LoRA, and --quantize was not given")
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        write(run, arguments.quantize, merges, scratch)
        name_base(scratch, str((out / runs.BASE).absolute()))
        scratch.rename(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"The merged model is in {out}")
    return 0


def write(run: Any, bits: int | None, merges: bool, folder: Path) -> None:
    """Write the copy into a folder."""
    from ..adapters import quantize_bank
    from ..training import run as runs

    config, model = run.config, run.model
    if config.model.base_model_name is None:
        model.quantize_memory(bits)
        model.save_pretrained(folder)
    elif not config.memory.has_memory:
        model.merge_and_unload().save_pretrained(folder / runs.BASE)
        run.tokenizer.save_pretrained(folder / runs.BASE)
    else:
        if bits is not None:
            quantize_bank(model, bits)
        if merges:
            merge_lora(model)
        model.save_pretrained(folder, selected_adapters=["default"])
        base = model.get_base_model()
        # Names as the base model has them: adapters are its children.
        plain = {name: p for name, p in base.state_dict().items() if "memory_adapter" not in name}
        base.save_pretrained(folder / runs.BASE, state_dict=plain)
        run.tokenizer.save_pretrained(folder / runs.BASE)
    run.tokenizer.save_pretrained(folder)
    memory = replace(config.memory, use_lora=False, use_both_memory_and_lora=False) if merges else config.memory
    if bits is not None:
        memory = replace(memory, quantize_memory=True, memory_quant_bits=bits)
    config.memory = replace(memory, use_memory_adapter=config.memory.has_memory)
    runs.write_effective(config, folder)


def merge_lora(model: Any) -> None:
    """Merge the LoRA beside a memory adapter into the base model's weights, and take it away."""
    from peft.tuners.lora import LoraLayer

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoraLayer):
                child.merge(safe_merge=True)  # type: ignore[attr-defined]
                setattr(parent, name, child.get_base_layer())
    for name in [name for name, config in model.peft_config.items() if config.peft_type == "LORA"]:
        del model.peft_config[name]
