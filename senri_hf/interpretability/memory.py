"""What a memory holds, as activations: to train an autoencoder on, and to change its latents."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..memory import MemoryCache
from ..memory.layer import MemoryLayer
from .hooks import Columns
from .intervention import Edit, edited_latents
from .sparse_autoencoder import SparseAutoencoder, check_latents


def memory_slots(memory: MemoryCache, layer_idx: int, field: str, adapter_name: str | None = None) -> Tensor:
    """One field of what a memory layer holds, as activations [n, d]: all rows, slots that are zero left out.

    Args:
        field: A tensor of the layer's `state_dict()` whose last dimension is of vectors, such as `"store"`, or the
            associations of a compressive memory, whose rows are taken.
        adapter_name: Whose memory; not needed where the layer has one only.

    Raises:
        ValueError: when there is no such field, or more than one memory that may be meant.
    """
    held = vectors(memory_layer(memory, layer_idx, adapter_name), field)
    slots = held[field].flatten(0, -2)
    return slots[(slots != 0).any(-1)]


@torch.no_grad()
def edit_slots(
    memory: MemoryCache,
    layer_idx: int,
    field: str,
    sae: SparseAutoencoder,
    edits: Edit | Sequence[Edit],
    adapter_name: str | None = None,
) -> None:
    """Change latents of the vectors that a memory layer holds, for good (`memory.snapshot()` keeps what was).

    A slot t becomes t + dec(g) - dec(f), as in `intervene`; slots that are zero stay empty. The context is cleared.

    Args:
        layer_idx, field, adapter_name: As for `memory_slots`.
        edits: Applied in this order; of every mode but `"patch"`, since slots have no columns.

    Raises:
        ValueError: as `memory_slots`, and when an edit or the autoencoder does not fit; the memory is then as it was.
    """
    chosen = [edits] if isinstance(edits, Edit) else list(edits)
    for edit in chosen:
        check_latents(edit.indices, sae)
        if edit.mode == "patch":
            raise ValueError("mode='patch' was given, but what a memory holds has no columns to be patched by")
    layer = memory_layer(memory, layer_idx, adapter_name)
    held = vectors(layer, field)
    slots = held[field]
    _, change = edited_latents(sae, chosen, slots, Columns())
    filled = (slots != 0).any(-1, keepdim=True)
    changed = torch.where(filled, slots + change.to(slots.dtype), slots)
    memory.clear_context()
    layer.load_state_dict(held | {field: changed})


def memory_layer(memory: MemoryCache, layer_idx: int, adapter_name: str | None) -> MemoryLayer:
    """The memory layer of an index."""
    layers = [layer for layer in memory.memory_layers if layer.layer_idx == layer_idx]
    layers = [layer for layer in layers if adapter_name in (None, layer.adapter_name)]
    if len(layers) > 1:
        raise ValueError(f"Layer {layer_idx} has memories of {[layer.adapter_name for layer in layers]}: say whose")
    if not layers:
        known = [f"{layer.layer_idx} of {layer.adapter_name}" for layer in memory.memory_layers]
        raise ValueError(f"Layer {layer_idx} has no such memory; there are those of layers {known}")
    return layers[0]


def vectors(layer: MemoryLayer, field: str) -> dict[str, Tensor]:
    """The state of a memory layer, in which `field` is of vectors."""
    held = layer.state_dict()
    wide = sorted(name for name, tensor in held.items() if tensor.dim() >= 3)
    if field not in wide:
        raise ValueError(
            f"The memory of layer {layer.layer_idx} has no field {field!r} of vectors, but {wide or 'none'}"
        )
    return held
