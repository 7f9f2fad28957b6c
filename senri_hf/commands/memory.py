"""`senri-hf memory`: what a saved memory is, from its file alone."""

import argparse
from pathlib import Path
from typing import Any


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `memory` and its actions to the command line."""
    parser = commands.add_parser("memory", help="look at saved memories")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    show = actions.add_parser("show", help="say what a saved memory is; needs no model")
    show.add_argument(
        "file", metavar="FILE", help="folder that a memory was saved to, its memory.safetensors, or a Hub name"
    )
    show.set_defaults(run=run_show)


def run_show(arguments: argparse.Namespace) -> int:
    """Print what a saved memory is."""
    print(describe(arguments.file))
    return 0


def describe(name_or_path: str | Path) -> str:
    """What a saved memory is, for a person, from its file alone.

    Raises:
        OSError: when there is none. ValueError: when it is damaged, or of another format.
    """
    from ..memory import file

    path = Path(name_or_path)
    tensors, description = file.load(path.parent if path.is_file() and path.name == file.WEIGHTS else name_or_path)
    broken = sorted(name for name, t in tensors.items() if t.is_floating_point() and not bool(t.isfinite().all()))
    if broken:
        raise ValueError(f"{name_or_path} is damaged: {', '.join(broken)} holds NaN or infinity. Use an earlier copy")
    model, seen = description["model"], description["tokens_seen"]
    name, architecture = model.get("name_or_path"), model["architecture"]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    kind = f"{architecture}, {model['num_hidden_layers']} layers of {model['hidden_size']}"
    lines = [
        f"model        {f'{name} ({kind})' if name else kind}",
        f"id           {description['memory']}",
        f"parent       {description['parent'] or 'none: it began empty'}",
        f"rows         {len(seen)}",
        f"tokens seen  {', '.join(f'{tokens:,}' for tokens in seen) or '0'}",
        f"bytes        {size:,}",
        f"format       {description['format_version']}",
        f"layers       {len(description['layers'])}",
    ]
    settings = file.attention_settings(description)
    for adapter, index, kind in description["layers"]:
        prefix = f"{adapter}.{index}."
        held = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        slots = settings.slots if settings is not None and kind == "attention_memory" else None
        lines.append(f"  layer {index} ({adapter}, {kind}): {fullness(held, slots) if held else 'empty'}")
    return "\n".join(lines)


def fullness(held: dict[str, Any], slots: int | None = None) -> str:
    """How full one layer's memory is, over all rows; the names of its tensors for a mechanism not known here.

    Args:
        slots: Those of a memory without training, per row.
    """
    if slots is not None:
        live, conversations = held["live"], held["conversations"].tolist()
        surprise = held["surprise"][live].mean().item() if live.any() else 0.0
        return (
            f"{int(live.sum())} of {slots * live.shape[0]} slots, mean surprise {surprise:.3g} nats, conversations per "
            f"row: {conversations}"
        )
    if not {"buffer_tag", "strength", "tag", "surprise"} <= held.keys():
        return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in sorted(held.items()))
    from ..memory.episodic import EMPTY

    parts = []
    for what, tag, value, measure in (
        ("buffer", held["buffer_tag"], held["strength"], "strength"),
        ("store", held["tag"], held["surprise"], "surprise"),
    ):
        used = tag != EMPTY
        count = int(used.sum())
        mean = f", mean {measure} {value[used].mean().item():.3g}" if count else ""
        parts.append(f"{what} {count} of {tag.numel()} slots{mean}")
    return "; ".join(parts)
