"""The memory cache: the context of a conversation, and the memory that outlives it, as one transformers cache."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, StaticLayer

from ..configuration.attention_memory import AttentionMemoryConfig
from . import file
from .associative import SLOTS, AssociativeOperations
from .attention_layer import AttentionMemoryLayer
from .fingerprint import fingerprint
from .key_values import KeyValueLayer
from .layer import ROLLBACK_TOKENS, MemoryLayer
from .observation import observe
from .owner import owners
from .served import refusal, try_out
from .words import Remembered, remembered, slots_that_say


# What stands for an adapter's name in the memory of a model that has it built in.
BUILT_IN = "model"


class MemoryCache(AssociativeOperations, DynamicCache):
    """A cache whose attention layers are transformers' own and whose memory layers outlive the context.

    Pass it as `past_key_values`. `clear_context()` ends a conversation: what attention could see is gone, the memory
    stays and is read from then on.

    Args:
        config: The model's config, from which the attention layers are made.
        memory_layers: The memory layers: those that are built into the model in their places, those of adapters
            appended.
        model_fingerprint: What tells this model and its adapters from others (see `fingerprint`); saved with the
            memory.
    """

    layers: list[Any]  # transformers' own, which have no type in common, and ours

    def __init__(
        self,
        config: PreTrainedConfig,
        memory_layers: list[MemoryLayer],
        model_fingerprint: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(config=config)
        if any(isinstance(layer, AttentionMemoryLayer) for layer in memory_layers):
            self.layers = [KeyValueLayer.like(layer) for layer in self.layers]
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.model_fingerprint = model_fingerprint or {}
        self.parent: str | None = None
        self.is_recording = False  # whether the open conversation was decoded with candidates
        # The context's last tokens: ids, and where surprise needs them the model's last hidden states and which of
        # them are real.
        self.recent_ids: Tensor | None = None  # [B, R]
        self.recent_decoded: Tensor | None = None  # [B, R] those of them that were fed alone, -1 for the others
        self.recent_hidden: Tensor | None = None  # [B, R, D]
        self.recent_real: Tensor | None = None  # [B, R]
        for layer in memory_layers:
            if layer.adapter_name == BUILT_IN and isinstance(self.layers[layer.layer_idx], MemoryLayer):
                self.layers[layer.layer_idx] = layer
            else:
                self.layers.append(layer)
        self._index()

    @classmethod
    def for_model(
        cls, model: PreTrainedModel, *, tokenizer: PreTrainedTokenizerBase | None = None, **settings: Any
    ) -> Self:
        """A new, empty memory for a model.

        A model with a memory adapter, or with memory of its own, gets that. A plain model gets memory without training:
        keys and values that its own attention reads; with `settings` any model does, beside its own.

        Args:
            tokenizer: Lets the memory be told in words (`summary`, `forget(matching=…)`).
            settings: Those of `AttentionMemoryConfig`: `slots`, `policy`, …

        Raises:
            ValueError: for a setting that does not exist or is out of its range, and for a model that cannot have a
                memory without training, with the reason.
        """
        layers = [layer for owner in owners(model) for layer in owner.memory_layers()]
        if settings or not layers:
            layers.append(attention_memory(cls, model, settings))
        memory = cls(model.config, layers, fingerprint(model))
        memory.tokenizer = tokenizer
        return memory

    @property
    def memory_layers(self) -> list[MemoryLayer]:  # type: ignore[override]
        """The layers that outlive the context."""
        return list(self._memory.values())

    def memory_layer(self, layer_idx: int, adapter_name: str) -> MemoryLayer | None:
        """The memory of one adapter in one decoder layer, None where the cache has none."""
        return self._memory.get((layer_idx, adapter_name))

    def _index(self) -> None:
        self._memory = {
            (layer.layer_idx, layer.adapter_name): layer for layer in self.layers if isinstance(layer, MemoryLayer)
        }
        for layer in self._memory.values():
            layer.bind(self.layers)

    @property
    def attention_memory(self) -> AttentionMemoryLayer | None:
        """The memory without training, where there is one."""
        return next((layer for layer in self.memory_layers if isinstance(layer, AttentionMemoryLayer)), None)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Columns that attention sees before the context's next token, memory's own included."""
        layer = self.layers[layer_idx]
        return layer.columns if isinstance(layer, KeyValueLayer) else super().get_query_offset(layer_idx)

    # The life of a memory.

    def clear_context(self) -> None:
        """End the conversation: attention forgets all of it, and what memory took in is read from now on."""
        for layer in self.memory_layers:
            layer.clear_context()
            if layer.is_blank:  # it was read at most: whoever comes next may be other rows
                layer.reset()
        self._clear_attention()

    def _clear_attention(self) -> None:
        """Have attention forget the context."""
        for layer in self.layers:
            if not isinstance(layer, MemoryLayer):
                layer.reset()
        self._clear_recent()

    def reset_memory(self, *, keep_frozen: bool = False) -> None:
        """Forget everything: the context and the memory.

        Args:
            keep_frozen: Whether slots that are frozen stay as they are.
        """
        if keep_frozen:
            for layer in self.memory_layers:
                layer.reset_but_frozen()
            self._clear_attention()
        else:
            self.reset()

    def reset(self) -> None:
        super().reset()
        self._clear_recent()

    def decay(self, cycles: int) -> None:
        """Let `cycles` conversations pass in which nothing was said."""
        if not isinstance(cycles, int) or isinstance(cycles, bool) or cycles < 0:
            raise ValueError(f"decay({cycles!r}) was called, but cycles must be a whole number of at least 0")
        for layer in self.memory_layers:
            layer.decay(cycles)

    @contextlib.contextmanager
    def read_only(self) -> Iterator[Self]:
        """Inside, memory is read and not changed in any way: no writes, no statistics, no access counts."""
        before = {place: layer.is_read_only for place, layer in self._memory.items()}
        for layer in self.memory_layers:
            layer.is_read_only = True
        try:
            yield self
        finally:  # on the layers as they are then: a `restore` inside puts others in their place
            for place, layer in self._memory.items():
                layer.is_read_only = before[place]

    def forget(self, last: int | None = None, *, matching: str | None = None) -> int:
        """Take tokens back, out of context and memory alike.

        Args:
            last: How many of the open conversation's last tokens.
            matching: Instead, words whose tokens memory without training is to drop. What other tokens took in of them
                while they were read stays: to be sure, reset the memory.

        Returns:
            How many tokens were dropped, per row all together.

        Raises:
            ValueError: when the memory no longer holds what it needs to go back that far.
        """
        if (last is None) == (matching is None):
            raise ValueError("forget() takes one of last, a number of tokens, and matching, words")
        if matching is not None:
            return self._forget_words(matching)
        if not isinstance(last, int) or last < 0:
            raise ValueError(
                f"forget(last={last!r}) was called, but last must be a whole number of tokens of at least 0"
            )
        self.crop(-last)
        return last

    def _forget_words(self, text: str) -> int:
        layer = self.attention_memory
        if layer is None or self.tokenizer is None:
            lacks = "memory without training" if layer is None else "a tokenizer: set memory.tokenizer"
            raise ValueError(f"forget(matching={text!r}) was called, but this memory has no {lacks}")
        if not text.strip():
            raise ValueError(f"forget(matching={text!r}) was called, but matching must be words")
        if self.get_seq_length() > 0:
            raise ValueError("forget(matching=…) was called in an open conversation; end it with clear_context() first")
        if layer.slots is None:
            return 0
        chosen = slots_that_say(layer.slots, self.tokenizer, text)
        layer.forget_slots(chosen)
        return int(chosen.sum())

    def remembered(self, row: int = 0) -> list[Remembered]:
        """What memory without training holds, in words, oldest first.

        Raises:
            ValueError: when there is no such memory, or no tokenizer.
        """
        layer = self.attention_memory
        if layer is None or self.tokenizer is None:
            lacks = "memory without training" if layer is None else "tokenizer; set memory.tokenizer"
            raise ValueError(f"What is remembered cannot be told in words: this memory has no {lacks}")
        return [] if layer.slots is None else remembered(layer.slots, self.tokenizer, row)

    def crop(self, tokens_to_remove: int) -> None:
        recent = None if self.recent_ids is None else self.recent_ids.shape[1]
        if recent is not None and recent <= -tokens_to_remove < self.get_seq_length():
            raise ValueError(
                f"{-tokens_to_remove} tokens are to be taken back, but what precedes them is known for the last "
                f"{recent - 1} only. Take a memory.snapshot() before, and restore it"
            )
        before = self.snapshot()
        try:
            super().crop(tokens_to_remove)
        except Exception:
            self.restore(before)
            raise
        if tokens_to_remove:
            self._map_recent(lambda tensor: tensor[:, :tokens_to_remove])

    def activate_past_recording(self) -> None:
        super().activate_past_recording()
        self.is_recording = True

    def note_tokens(self, ids: Tensor | None) -> None:
        """Remember the last tokens of the context, ids [B, T]."""
        if ids is None:
            self.recent_ids, self.recent_decoded = None, None
            return
        self.recent_ids = keep_last(self.recent_ids, ids)
        alone = ids if ids.shape[1] == 1 else torch.full_like(ids, -1)
        self.recent_decoded = keep_last(self.recent_decoded, alone)

    def note_hidden(self, hidden: Tensor, real: Tensor) -> None:
        """Remember the model's last hidden states [B, T, D] of the context's last tokens, and which were real."""
        self.recent_hidden = keep_last(self.recent_hidden, hidden.detach())
        self.recent_real = keep_last(self.recent_real, real)

    def _clear_recent(self) -> None:
        self.recent_ids, self.recent_decoded, self.recent_hidden, self.recent_real = None, None, None, None
        self.is_recording = False

    # Copies.

    def snapshot(self) -> "MemoryCache":
        """A copy of everything as it is now, to `restore` later; cheap, as memory is never changed in place."""
        other = copy.copy(self)
        other.layers = [copy_layer(layer) for layer in self.layers]
        other._index()
        for layer in other.memory_layers:  # whether this cache is in `read_only()` says nothing of its copy
            layer.is_read_only = False
        return other

    def restore(self, snapshot: "MemoryCache") -> None:
        """Become what a `snapshot()` of this cache holds; the snapshot stays usable, and `read_only()` stays in force.

        Raises:
            ValueError: when the snapshot is of another model's cache.
        """
        if snapshot._memory.keys() != self._memory.keys() or len(snapshot.layers) != len(self.layers):
            raise ValueError(
                f"The snapshot has the memory layers {sorted(snapshot._memory)}, this cache {sorted(self._memory)}: "
                "restore takes a snapshot() of the same cache"
            )
        read_only = {place: layer.is_read_only for place, layer in self._memory.items()}
        self.__dict__.update(snapshot.snapshot().__dict__)
        for place, layer in self._memory.items():
            layer.is_read_only = read_only[place]

    def fork(self, copies: int) -> "MemoryCache":
        """A new cache with every row repeated `copies` times, for as many continuations; this one is left as it is."""
        if not isinstance(copies, int) or copies < 1:
            raise ValueError(f"fork({copies!r}) was called, but copies must be a whole number of at least 1")
        other = self.snapshot()
        other.batch_repeat_interleave(copies)
        return other

    def select_rows(self, indices: Tensor | list[int]) -> "MemoryCache":
        """A new cache with the rows at `indices`, in that order; this one is left as it is."""
        other = self.snapshot()
        index = torch.as_tensor(indices)
        if index.numel() and (index.is_floating_point() or index.dtype == torch.bool):
            raise ValueError(f"select_rows({index.tolist()}) was called, but rows are named by whole numbers")
        index, rows = index.long(), self.rows
        if rows is not None and index.numel() and not bool(((index >= 0) & (index < rows)).all()):
            raise ValueError(f"select_rows({index.tolist()}) was called, but this memory has rows 0 to {rows - 1}")
        other.batch_select_indices(index)
        return other

    def to(self, device: torch.device | str) -> Self:
        """Move context and memory to a device, in place, as `Module.to` does."""
        for layer in self.layers:
            if isinstance(layer, MemoryLayer):
                layer.map_rows(lambda tensor: tensor.to(device))
            elif isinstance(layer, KeyValueLayer):
                layer.map(lambda tensor: tensor.to(device))
            elif layer.is_initialized and layer.keys is not None:
                layer.keys, layer.values = layer.keys.to(device), layer.values.to(device)
                layer.device = layer.keys.device
        self._map_recent(lambda tensor: tensor.to(device))
        return self

    def detach(self) -> None:
        """Cut the graph that leads to what memory holds: where backpropagation through conversations ends."""
        for layer in self.memory_layers:
            layer.detach()

    def take_losses(self) -> list[Tensor]:
        """The losses that memory layers gathered since they were last taken: those of surprise predictors."""
        losses = [loss for layer in self.memory_layers for loss in layer.losses]
        for layer in self.memory_layers:
            layer.losses = []
        return losses

    def take_conversation_scores(self) -> list[Tensor]:
        """How much the tokens of the last pass read which conversation, for each layer that tells (see `Reading`)."""
        taken = [layer.conversation_scores for layer in self.memory_layers if layer.conversation_scores is not None]
        for layer in self.memory_layers:
            layer.conversation_scores = None
        return taken

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._map_recent(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map_recent(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._map_recent(lambda tensor: tensor[beam_idx.to(tensor.device)])

    def _map_recent(self, function: Callable[[Tensor], Tensor]) -> None:
        for name in ("recent_ids", "recent_decoded", "recent_hidden", "recent_real"):
            held = getattr(self, name)
            setattr(self, name, None if held is None else function(held))

    # What a person asks.

    @property
    def rows(self) -> int | None:
        """Rows of the batch that the memory holds, None while it holds nothing."""
        return next((layer.rows for layer in self.memory_layers if layer.rows is not None), None)

    @property
    def nbytes(self) -> int:
        """Bytes of memory, committed, staged and open, all rows and layers, without the context.

        While a conversation is open there is working space on top, bounded however long the conversation gets: the
        journal from which last tokens are taken back, tokens that wait to be taken in, and keys and values projected
        from memory, or moved to where they are read. It ends with `clear_context()`.
        """
        return sum(layer.nbytes for layer in self.memory_layers)

    @property
    def context_nbytes(self) -> int:
        """Bytes of the context: the keys and values that attention can still see, and what memory without training
        has to know of their tokens when the conversation ends.
        """
        held = [
            tensor
            for layer in self.layers
            for tensor in (layer.context() if isinstance(layer, KeyValueLayer) else (layer.keys, layer.values))
            if isinstance(tensor, Tensor)
        ]
        noted = 0 if self.attention_memory is None else self.attention_memory.context_nbytes
        return noted + sum(tensor.numel() * tensor.element_size() for tensor in held)

    @property
    def tokens_seen(self) -> Tensor:
        """Tokens that memory took in during each row's life, [batch] int64; empty before the first."""
        seen = (layer.tokens_seen for layer in self.memory_layers)
        return next((tokens for tokens in seen if tokens is not None), torch.zeros(0, dtype=torch.long))

    def summary(self) -> str:
        """How full the memory is, layer by layer, for a person."""
        layers, seen = self.memory_layers, self.tokens_seen.tolist()
        lines = [f"{self.nbytes:,} bytes in {len(layers)} layers, tokens seen per row: {seen}"]
        for layer in layers:
            numbers = ", ".join(f"{name} {value:.3g}" for name, value in layer.summary().items())
            lines.append(f"  layer {layer.layer_idx} ({layer.adapter_name}): {numbers or 'empty'}")
        if self.attention_memory is not None and self.tokenizer is not None and self.rows:
            for row in range(self.rows):
                words = (f"{p.text!r} {p.surprise:.1f} ({p.conversations_ago} ago)" for p in self.remembered(row))
                said = ", ".join(words) or "nothing"
                lines.append(
                    f"  row {row} remembers, with its surprise in nats, and of how many conversations ago: {said}"
                )
            if self.attention_memory.said:
                lines.append("  the open conversation is taken in when it ends")
        return "\n".join(lines)

    # Memory as data.

    def state_dict(self) -> dict[str, Tensor]:
        """The memory as it would be after `clear_context()`, by names `adapter.layer.field`."""
        return {
            f"{layer.adapter_name}.{layer.layer_idx}.{name}": tensor
            for layer in self.memory_layers
            for name, tensor in layer.state_dict().items()
        }

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Hold the memory of a `state_dict`, with an empty context.

        A memory of one adapter fits a model with one adapter, whatever either is called.

        Raises:
            ValueError: naming what does not fit; this memory is then as it was.
        """
        parts: dict[tuple[str, int], dict[str, Tensor]] = {}
        places = {key: file.place_of(key) for key in tensors}
        ours = {layer.adapter_name for layer in self.memory_layers}
        names = file.adapter_names({adapter_name for adapter_name, _, _ in places.values()}, ours)
        for key, (adapter_name, layer_idx, name) in places.items():
            if not layer_idx.isdigit():
                raise ValueError(f"{key!r} is no name of a memory tensor: expected adapter.layer.field")
            parts.setdefault((names[adapter_name], int(layer_idx)), {})[name] = tensors[key]
        expected = {(layer.adapter_name, layer.layer_idx): layer for layer in self.memory_layers}
        # An adapter whose memory is blank has no part in a state dict; one that has a part has all its layers in it.
        written = {name for name, _ in parts}
        if parts.keys() != {place for place in expected if place[0] in written}:
            raise ValueError(
                f"The memory is of layers {sorted(parts)}, but this model's memory layers are {sorted(expected)}: it "
                "was made with another adapter"
            )
        for place, memory_layer in expected.items():
            memory_layer.check_state_dict(parts.get(place, {}))
        counts = {tensor.shape[0] for part in parts.values() for tensor in part.values()}
        if len(counts) > 1:
            raise ValueError(f"The memory's layers hold different numbers of rows: {sorted(counts)}")
        for place, memory_layer in expected.items():
            memory_layer.load_state_dict(parts.get(place, {}))
        self._clear_attention()

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save the memory (not the context) as a folder: safetensors, a JSON that says what it is, and a card.

        An open conversation is saved as if it ended now; it goes on undisturbed.

        Args:
            push_to_hub: Also upload it; `kwargs` then go to `push_to_hub`, with `repo_id` defaulting to the folder's
                name.
        """
        file.save(self.state_dict(), self.description(), Path(save_directory))
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload memory",
    ) -> str:
        """Upload the memory as a repository of its own on the Hub; returns the commit's address."""
        return file.push(
            self.state_dict(),
            self.description(),
            repo_id,
            private=private,
            token=token,
            revision=revision,
            commit_message=commit_message,
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        model: PreTrainedModel,
        device: torch.device | str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **hub_kwargs: Any,
    ) -> Self:
        """Load a memory that `save_pretrained` wrote, from a folder or from the Hub.

        Args:
            model: The model that is to read it: the one that wrote it, or an equal one.
            device: Where to put it; the model's device when None.
            tokenizer: Lets the memory be told in words, as for `for_model`.
            hub_kwargs: `revision`, `token`, `cache_dir`, … as for any download.

        Raises:
            ValueError: when the file does not fit the model, naming what differs.
            OSError: when there is no such memory.
        """
        tensors, description = file.load(pretrained_model_name_or_path, **hub_kwargs)
        if SLOTS in description:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds single slots, no whole memory: use memory.import_slots on one"
            )
        settings = file.attention_settings(description)
        memory = cls.for_model(model, tokenizer=tokenizer, **({} if settings is None else asdict(settings)))
        file.check_fits(description, memory.description())
        memory.load_state_dict(tensors)
        memory.parent = description["memory"]
        return memory.to(model.device if device is None else device)

    def description(self) -> dict[str, Any]:
        """What a memory file says of itself, without its tensors."""
        attention = self.attention_memory
        return {
            "model": self.model_fingerprint,
            **({} if attention is None else {"attention_memory": attention.settings}),
            "tokens_seen": self.tokens_seen.tolist(),
            "parent": self.parent,
            "layers": [[layer.adapter_name, layer.layer_idx, layer._layer_type] for layer in self.memory_layers],
            "rules": [layer.rules for layer in self.memory_layers],
        }


def layer_in(
    cache: Cache,
    layer_idx: int,
    adapter_name: str,
    new_layer: Callable[[int, str], MemoryLayer],
    attention_layers: int,
) -> MemoryLayer:
    """A memory layer in a cache of any kind, appended where it has none yet: for state that is part of the context.

    Args:
        new_layer: Makes a blank one, from `layer_idx` and `adapter_name`.
        attention_layers: Attention layers of the model, which come first in a cache.
    """
    for layer in cache.layers:
        if isinstance(layer, MemoryLayer) and (layer.layer_idx, layer.adapter_name) == (layer_idx, adapter_name):
            return layer
    # A cache that grows as it is used would take ours for one of attention's.
    while isinstance(cache, DynamicCache) and len(cache.layers) < attention_layers:
        cache.layers.append(cache.layer_class_to_replicate())  # type: ignore[misc]
    layer = new_layer(layer_idx, adapter_name)
    cache.layers.append(layer)
    return layer


def attention_memory(
    cache_class: type[MemoryCache], model: PreTrainedModel, settings: dict[str, Any]
) -> AttentionMemoryLayer:
    """A blank memory without training, for a model that was found to be served."""
    config = AttentionMemoryConfig.of(settings)
    whole: Any = model
    base: PreTrainedModel = whole.get_base_model() if hasattr(whole, "get_base_model") else whole

    def remembers(ids: Tensor, layouts: list[Any], rotary: Any) -> MemoryCache:
        everything = AttentionMemoryConfig(slots=ids.shape[1], policy="all", sinks=0)
        memory = cache_class(base.config, [AttentionMemoryLayer(everything, base, layouts, rotary)])
        base(input_ids=ids, past_key_values=memory)
        memory.clear_context()
        return memory

    stop_observing = observe(base)
    try:
        # An adapter would look for its own memory in the caches of the trial.
        with whole.disable_adapter() if base is not whole else contextlib.nullcontext():
            served = try_out(base, remembers)
        if config.policy == "surprise" and not served.tells_surprise:
            raise refusal(
                base,
                "its logits are more than its output embeddings make of its last hidden states, from which surprise is "
                "told; policy='recent' needs none",
            )
    except BaseException:
        stop_observing()
        raise
    return AttentionMemoryLayer(config, base, served.layouts, served.rotary)


def copy_layer(layer: Any) -> Any:
    """A cache layer that goes its own way from here; only static layers are changed in place, and so are cloned."""
    if isinstance(layer, MemoryLayer):
        return layer.copy()
    other = copy.copy(layer)
    if isinstance(layer, StaticLayer) and layer.is_initialized:
        other.keys, other.values = other.keys.clone(), other.values.clone()
    return other


def keep_last(held: Tensor | None, new: Tensor) -> Tensor:
    """The last columns of both, as many as can be taken back and one more; a copy, so that the others can go."""
    joined = new if held is None else torch.cat([held, new], dim=1)
    return joined[:, -ROLLBACK_TOKENS - 1 :].clone()
