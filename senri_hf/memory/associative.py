"""What a memory cache can do with associative matrices: keep slots, hand them on, add memories up, read backwards."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from . import file
from .compressive_layer import CompressiveLayer
from .layer import MemoryLayer


# What tells a file of slots from one of a whole memory.
SLOTS = "slots"


class AssociativeOperations:
    """Mixin of the memory cache; all of it is about its compressive layers.

    Slots are numbered from 0 in every layer. What one row holds is never another's: slots are frozen, exported and
    imported for all rows alike.
    """

    memory_layers: list[MemoryLayer]

    def description(self) -> dict[str, Any]:
        """What a memory file says of itself, without its tensors."""
        raise NotImplementedError

    @property
    def associative_layers(self) -> list[CompressiveLayer]:
        """The layers that hold associative matrices."""
        return [layer for layer in self.memory_layers if isinstance(layer, CompressiveLayer)]

    def freeze(self, slots: Sequence[int]) -> None:
        """Have slots only be read from now on; those that are not frozen take what is written.

        What was read before cannot be taken back then: `forget` goes back to here.

        Raises:
            ValueError: for a slot that there is not, or while nothing is held.
        """
        self._set_frozen("freeze", slots, frozen=True)

    def unfreeze(self, slots: Sequence[int]) -> None:
        """Have slots be written again, in their turn; ValueError as for `freeze`."""
        self._set_frozen("unfreeze", slots, frozen=False)

    def _set_frozen(self, method: str, slots: Sequence[int], *, frozen: bool) -> None:
        layers = self._layers_that_hold(method)
        chosen = [layer.check_slots(slots) for layer in layers]
        for layer, indices in zip(layers, chosen, strict=True):
            layer.freeze(indices, frozen=frozen)

    def export_slots(self, save_directory: str | Path, slots: Sequence[int]) -> None:
        """Save single slots as a folder of safetensors, JSON and a card, for `import_slots`.

        An open conversation is saved as if it ended now; it goes on undisturbed.

        Raises:
            ValueError: for a slot that there is not, or while nothing is held.
        """
        tensors = {
            f"{layer.adapter_name}.{layer.layer_idx}.{name}": tensor
            for layer in self._layers_that_hold("export_slots")
            for name, tensor in layer.slot_tensors(layer.check_slots(slots)).items()
        }
        file.save(tensors, {**self.description(), SLOTS: [int(slot) for slot in slots]}, Path(save_directory))

    def import_slots(
        self,
        name_or_path: str | Path,
        into: Sequence[int] | None = None,
        *,
        freeze: bool = False,
        **hub_kwargs: Any,
    ) -> None:
        """Put slots that `export_slots` saved into slots of this memory, over what those held.

        Args:
            name_or_path: A folder, or the name of a repository on the Hub.
            into: The slots that they go into, in their order; those that they were when None.
            freeze: Whether they are only read from then on.
            hub_kwargs: `revision`, `token`, `cache_dir`, … as for any download.

        A file of one row goes into every row of this memory.

        Raises:
            ValueError: when the file does not fit the model, is none of slots, or a conversation is open; this memory
                is then as it was.
            OSError: when there is no such file.
        """
        self._check_between_conversations("import_slots")
        tensors, description = file.load(name_or_path, **hub_kwargs)
        if SLOTS not in description:
            raise ValueError(
                f"{name_or_path} is a whole memory, no slots: read it with MemoryCache.from_pretrained, or save slots "
                "with memory.export_slots"
            )
        file.check_fits(description, self.description())
        slots = description[SLOTS] if into is None else into
        if len(slots) != len(description[SLOTS]):
            raise ValueError(f"into={list(slots)} was given, but the file holds {len(description[SLOTS])} slot(s)")
        layers, parts = self.associative_layers, []
        places = {key: file.place_of(key) for key in tensors}
        names = file.adapter_names({adapter for adapter, _, _ in places.values()}, {one.adapter_name for one in layers})
        held: dict[tuple[str, str], dict[str, Tensor]] = {}
        for key, (adapter, layer_idx, field) in places.items():
            held.setdefault((names[adapter], layer_idx), {})[field] = tensors[key]
        for layer in layers:
            part = held.pop((layer.adapter_name, str(layer.layer_idx)), {})
            parts.append((layer.check_slots(slots), part))
            layer.check_slot_tensors(part, len(slots))
        if held:
            raise ValueError(
                f"{name_or_path} holds slots of the layers {sorted(held)} too, but this memory's are "
                f"{[(layer.adapter_name, layer.layer_idx) for layer in layers]}: it was made with another model"
            )
        for layer, (indices, part) in zip(layers, parts, strict=True):
            layer.put_slots(indices, part, freeze=freeze)

    def merge(self, other: "AssociativeOperations", base: "AssociativeOperations | None" = None) -> dict[int, str]:
        """Take in what another memory of the same model was written with.

        Args:
            other: The other one, of as many rows.
            base: What both come from, a `snapshot()` or a `fork()`; an empty memory when None.

        Returns:
            How, by layer: `"sum"`, for the additive rule: matrices are added up, which is what reading both texts one
            after the other into this layer would have left. `"replay"`, for rules that take away what they find: the
            tokens that `other` still has in its journal are written again, after all that is here.

        Raises:
            ValueError: when a conversation is open here, the memories do not fit, or a replay is needed and `other`'s
                journal does not reach back to `base` any more; this memory is then as it was.
        """
        self._check_between_conversations("merge")
        layers = self._layers_that_hold("merge", written=False)
        theirs = {(layer.layer_idx, layer.adapter_name): layer for layer in other.associative_layers}
        bases = {} if base is None else {(one.layer_idx, one.adapter_name): one for one in base.associative_layers}
        places = [(layer.layer_idx, layer.adapter_name) for layer in layers]
        if sorted(theirs) != sorted(places) or (base is not None and bases.keys() != theirs.keys()):
            raise ValueError(f"This memory has the layers {places}, the other one {sorted(theirs)}: they do not fit")
        merged = [layer.merged(theirs[place], bases.get(place)) for layer, place in zip(layers, places, strict=True)]
        for layer, state in zip(layers, merged, strict=True):
            layer.hold(state)
        return {layer.layer_idx: "replay" if layer.removes else "sum" for layer in layers}

    def read_reverse(self, values: Tensor, layer_idx: int | None = None) -> Tensor:
        """What keys memory holds values under: v Mᵀ, summed over slots.

        Written pairs are Σ kᵀu, so that a value asks for its key as a key asks for its value. Compare what comes out
        with key features by their cosine.

        Args:
            values: [B, T, H, d_v], as `CompressiveMemory.associations` makes them.
            layer_idx: Which layer is read; it may be left out where there is one.

        Returns:
            Key features [B, T, H, d_k], float32.

        Raises:
            ValueError: for a layer that there is not, values of another shape, or while nothing is held.
        """
        layers = {layer.layer_idx: layer for layer in self._layers_that_hold("read_reverse")}
        if layer_idx is None and len(layers) == 1:
            (layer_idx,) = layers
        if layer_idx not in layers:
            raise ValueError(f"layer_idx={layer_idx!r} was given, but memory is in the layers {sorted(layers)}")
        return layers[layer_idx].read_reverse(values)

    def _layers_that_hold(self, method: str, *, written: bool = True) -> list[CompressiveLayer]:
        """The associative layers; ValueError where there are none, or, if `written`, nothing is in them."""
        layers = self.associative_layers
        if not layers:
            raise ValueError(
                f"{method}() was called, but this memory has no layer that it serves: one of Senri or of the "
                "compressive adapter"
            )
        if written and any(layer.now is None for layer in layers):
            raise ValueError(f"{method}() was called, but this memory holds nothing yet")
        return layers

    def _check_between_conversations(self, method: str) -> None:
        if any(layer.columns for layer in self.associative_layers):
            raise ValueError(f"{method}() was called in an open conversation; end it with clear_context() first")
