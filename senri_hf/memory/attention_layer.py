"""The cache layer of memory without training: it consolidates what a conversation left in the attention layers."""

import copy
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..configuration.attention_memory import AttentionMemoryConfig
from .attention_memory import Said, Slots, consolidate, keep_best, pass_cycles
from .key_values import KeyValueLayer
from .layer import MemoryLayer
from .reads import Reads
from .real_tokens import is_any
from .rotation import KeyLayout
from .state import RowState, check_tensors
from .surprise import token_surprise


ADAPTER_NAME = "attention"
CHUNKS = 64


@dataclass(frozen=True)
class Columns(RowState):
    """Columns of the open conversation."""

    token: Tensor  # [B, T] int64
    position: Tensor  # [B, T] int64
    real: Tensor  # [B, T] bool
    written: Tensor  # [B, T] bool
    repeated: Tensor  # [B, T] bool, the beginning of a text where memory holds one: attention passes it by
    hidden: Tensor  # [B, T, D] the model's last hidden states, for surprise; D = 0 where nobody asks for that


class AttentionMemoryLayer(MemoryLayer):
    """Keys and values of the tokens that surprised the model, before those of the context, in every attention layer.

    One for a whole cache: which tokens stay is the same for all its attention layers, which hold the keys and values.
    A conversation is consolidated when it ends; until then its tokens are context.

    Args:
        config: What is kept.
        model: The model, whose surprise decides; it is not kept alive.
        layouts: What every attention layer of its cache holds, None for those that hold nothing of their own.
        rotary: The model's rotary position embedding, None where keys carry no position.
    """

    _layer_type = "attention_memory"

    def __init__(
        self,
        config: AttentionMemoryConfig,
        model: PreTrainedModel,
        layouts: list[KeyLayout | None],
        rotary: torch.nn.Module | None,
    ) -> None:
        super().__init__(0, ADAPTER_NAME)
        self.config = config
        self.model = weakref.ref(model)
        self.layouts, self.rotary = layouts, rotary
        self.attention: list[KeyValueLayer] = []
        self.slots: Slots | None = None
        self.said: tuple[Columns, ...] = ()
        self.reads = Reads()
        self.begun: Tensor | None = None  # [B] bool, the rows of which a token was said; None for no row
        self.coming: Columns | None = None  # the columns of the pass that is under way
        self.coming_read: Tensor | None = None  # [B, T, M] float32, the attention that they gave to each slot

    def bind(self, layers: list[Any]) -> None:
        self.attention = [layer for layer in layers if isinstance(layer, KeyValueLayer)]

    @property
    def memory_length(self) -> int:
        """Columns of memory that attention sees."""
        return 0 if self.slots is None else self.slots.size

    @property
    def context_length(self) -> int:
        """Columns of the open conversation so far."""
        return sum(chunk.token.shape[1] for chunk in self.said)

    @property
    def needs_surprise(self) -> bool:
        """Whether it matters how surprising tokens are."""
        return self.config.policy == "surprise"

    @property
    def watches_attention(self) -> bool:
        """Whether it matters how much of its attention the pass under way gives to memory."""
        matters = self.needs_surprise and self.config.read_gain > 0
        return matters and self.memory_length > 0 and not self.is_read_only

    # The open conversation.

    def note(self, columns: Columns) -> None:
        """Remember what a pass said, until the conversation is over."""
        self.check_rows(columns.token.shape[0])
        if self.slots is None:
            self.slots = Slots.empty(columns.token.shape[0], 0, columns.token.device)
        if self.coming_read is not None:
            self.reads = self.reads.add(self.context_length, self.coming_read * columns.written[..., None])
        self.said, self.coming, self.coming_read = (*self.said, columns), None, None
        if len(self.said) > CHUNKS:  # one per token of a reply
            self.said = (join(self.said),)
        begins = columns.real.any(1)
        self.begun = begins if self.begun is None else self.begun | begins

    def rollback(self, tokens: int) -> None:
        held = self.context_length
        if tokens > held:
            raise ValueError(f"{tokens} tokens are to be taken back, but the open conversation has {held}")
        self.reads = self.reads.before(held - tokens, held)
        chunks = list(self.said)
        while tokens:
            last = chunks.pop()
            left = last.token.shape[1] - tokens
            tokens = max(-left, 0)
            if left > 0:
                chunks.append(last.map(lambda tensor, left=left: tensor[:, :left]))  # type: ignore[misc]
        self.said = tuple(chunks)
        self.begun = torch.stack([chunk.real.any(1) for chunk in chunks]).any(0) if chunks else None

    # Its end.

    def clear_context(self) -> None:
        if self.slots is not None and self.said:
            self._hold(*self._closed())
        self._begin()

    def _begin(self) -> None:
        """Of a new conversation nothing was said."""
        self.said, self.reads, self.begun = (), Reads(), None

    @torch.no_grad()
    def _closed(self) -> tuple[Slots, list[tuple[Tensor, Tensor] | None]]:
        """The slots, and every attention layer's keys and values, as they are once the conversation is over."""
        assert self.slots is not None
        if not self.said:
            return self.slots, [self._memory_of(layer) for layer in self.attention]
        columns = join(self.said)
        read = self.reads.total
        read = torch.zeros_like(self.slots.importance) if read is None else read
        said = Said(columns.token, self._surprise(columns), columns.written, self._same(columns), read)
        slots, source = consolidate(self.slots, said, self.config)
        return slots, [
            None if layout is None else self._gather(layer, layout, source, columns.position)
            for layer, layout in zip(self.attention, self.layouts, strict=True)
        ]

    def _surprise(self, columns: Columns) -> Tensor:
        """[B, T]; 0 for the first token of the conversation and for what is not written."""
        if not self.needs_surprise:
            return columns.token.new_zeros(columns.token.shape, dtype=torch.float32)
        model = self.model()
        if model is None:
            raise RuntimeError("The model of this memory is gone, and with it what surprises it. Keep the model")
        before = last_before(columns.real)
        source = columns.hidden.gather(1, before.clamp_min(0)[..., None].expand_as(columns.hidden))
        surprise = token_surprise(model, source, columns.token.clamp_min(0))
        return surprise.masked_fill((before < 0) | ~columns.written, 0.0)

    def _same(self, columns: Columns) -> Tensor:
        """[B, T] the slot that holds the same token with the most similar value; -1 where none is similar enough."""
        none = torch.full_like(columns.token, -1)
        held = [layer for layer, layout in zip(self.attention, self.layouts, strict=True) if layout is not None]
        assert self.slots is not None
        if not self.slots.size or not held or self.config.merge_similarity > 1 or self.config.policy != "surprise":
            return none
        layer = held[len(held) // 2]  # the first layers know the word only, the last the next word
        values, known = layer.context()[1], layer.memory_values
        assert known is not None
        ours, theirs = (
            torch.nn.functional.normalize(v.transpose(1, 2).flatten(2).float(), dim=-1) for v in (values, known)
        )
        similar = ours @ theirs.transpose(1, 2)
        equal = (columns.token[..., None] == self.slots.token[:, None]) & self.slots.live[:, None]
        best = similar.masked_fill(~equal, -torch.inf).max(-1)
        return torch.where(columns.written & (best.values >= self.config.merge_similarity), best.indices, none)

    def _gather(
        self, layer: KeyValueLayer, layout: KeyLayout, source: Tensor, position: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A layer's keys, at position 0, and values of the columns `source` [B, M] of memory and context."""
        keys, values = layer.context()
        length = layer.memory_length
        chosen = (source - length).clamp_min(0)
        new_keys, new_values = take(keys, chosen), take(values, chosen)
        new_keys = layout.rotate(new_keys, -position.gather(1, chosen), self.rotary)
        known = self._memory_of(layer)
        if known is None or not length:
            return new_keys, new_values
        is_old = (source < length)[:, None, :, None]
        index = source.clamp_max(length - 1)
        return torch.where(is_old, take(known[0], index), new_keys), torch.where(
            is_old, take(known[1], index), new_values
        )

    def _memory_of(self, layer: KeyValueLayer) -> tuple[Tensor, Tensor] | None:
        if layer.memory_keys is None or layer.memory_values is None:
            return None
        return layer.memory_keys, layer.memory_values

    def _hold(self, slots: Slots, held: list[tuple[Tensor, Tensor] | None]) -> None:
        """Become a memory, with an empty context: keys are read at the positions -M to -1."""
        self.slots = slots
        self._begin()
        for layer, layout, kept in zip(self.attention, self.layouts, held, strict=True):
            if layout is None or kept is None or not slots.size:
                layer.forget()
                continue
            layer.remember(*kept, partial(before_context, layout, self.rotary, self.config.sharpness or 1.0))

    # What attention is told.

    def repeats(self, ids: Tensor, real: Tensor, start_ids: tuple[int, ...]) -> Tensor:
        """[B, T] the tokens that begin the conversation's text as memory begins, with one of `start_ids`.

        Models take such a token for the end of all that was before. Memory and conversation are one text, which has
        one beginning. With `policy="all"` memory is the context as it was, whatever stood there.
        """
        slots = self.slots
        if slots is None or not slots.size or not start_ids or self.config.policy == "all":
            return torch.zeros_like(real)
        # Of a run of them all go.
        starts = is_any(ids, start_ids)
        first = ((real & ~starts).cumsum(1) == 0) & real
        if self.begun is not None:
            first = first & ~self.begun[:, None]
        held = (slots.live & (slots.number == 0))[:, None] & (slots.token[:, None] == ids[..., None])
        return first & starts & held.any(-1)

    def widen(self, mask: Tensor | None, coming: Columns) -> Tensor | None:
        """An attention mask with memory's columns before the context's.

        Args:
            mask: [B, ctx + T], or [B, 1, T, ctx + T] of any kind; None where everything is seen.
            coming: The T columns of the pass.
        """
        slots = self.slots
        if slots is None or not slots.size:
            return mask
        passed_by = torch.cat([chunk.repeated for chunk in (*self.said, coming)], dim=1)
        seen = torch.cat([slots.live, ~passed_by], dim=1)
        if mask is None:
            return None if bool(seen.all()) else seen
        if mask.dim() == 2:
            return torch.cat([seen[:, : slots.size].to(mask.dtype), mask * seen[:, slots.size :]], dim=1)
        seen = seen[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1)
        mask = mask.expand(seen.shape[0], -1, -1, -1)
        if mask.dtype == torch.bool:
            return torch.cat([seen[..., : slots.size], mask & seen[..., slots.size :]], dim=-1)
        mask = torch.nn.functional.pad(mask, (slots.size, 0))
        return mask.masked_fill(~seen, torch.finfo(mask.dtype).min)

    # The rest of a memory's life.

    def reset(self) -> None:
        self.slots = None
        self._begin()
        for layer in self.attention:
            layer.forget()

    def decay(self, cycles: int) -> None:
        if self.slots is None or not self.slots.size:
            return
        self._keep(pass_cycles(self.slots, cycles, self.config))

    def forget_slots(self, chosen: Tensor) -> None:
        """Forget the slots where chosen [B, M] holds."""
        assert self.slots is not None
        self._keep(replace(self.slots, live=self.slots.live & ~chosen))

    def _keep(self, slots: Slots) -> None:
        """Drop the slots that are no longer live.

        In an open conversation, whose tokens stand behind them, they are hidden; they leave when it ends.
        """
        if self.said:
            self.slots = slots
            return
        kept, source = keep_best(slots, self.config)
        held: list[tuple[Tensor, Tensor] | None] = []
        for layer in self.attention:
            memory = self._memory_of(layer)
            held.append(None if memory is None else (take(memory[0], source), take(memory[1], source)))
        self._hold(kept, held)

    def detach(self) -> None:
        """Nothing to do: memory is made without a graph."""

    def map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        """The attention layers, which are layers of the cache too, are reached by themselves."""
        if self.slots is not None:
            self.slots = self.slots.map(function)
        self.said = tuple(chunk.map(function) for chunk in self.said)
        self.reads = self.reads.map(function)
        self.begun = None if self.begun is None else function(self.begun)

    def copy(self) -> "AttentionMemoryLayer":
        layer = copy.copy(self)
        layer.losses = []
        return layer

    # As data.

    @property
    def settings(self) -> dict[str, Any]:
        return asdict(self.config)

    def state_dict(self) -> dict[str, Tensor]:
        if self.slots is None:
            return {}
        slots, held = self._closed()
        if not bool(slots.tokens.any()):
            return {}
        tensors: dict[str, Tensor] = {}
        for index, kept in enumerate(held):
            if kept is not None:
                tensors |= {f"keys_{index}": kept[0], f"values_{index}": kept[1]}
        return slots.tensors() | tensors

    def check_state_dict(self, tensors: dict[str, Tensor]) -> None:
        if not tensors:
            return
        rows = tensors["tokens"].shape[0] if "tokens" in tensors and tensors["tokens"].dim() else 1
        size = tensors["token"].shape[1] if "token" in tensors and tensors["token"].dim() == 2 else 0
        if size > self.config.slots:
            raise ValueError(
                f"The memory holds {size} slots, but this one has room for {self.config.slots}. It was made with other "
                "settings"
            )
        expected = Slots.empty(rows, size, torch.device("meta")).tensors()
        kinds = {tensor.dtype for name, tensor in tensors.items() if name.startswith(("keys_", "values_"))}
        kind = kinds.pop() if len(kinds) == 1 else torch.float32
        kind = kind if kind.is_floating_point else torch.float32
        for index, layout in enumerate(self.layouts):
            if layout is not None and size:
                for name, width in (("keys", layout.key_size), ("values", layout.value_size)):
                    shape = (rows, layout.heads, size, width)
                    expected[f"{name}_{index}"] = torch.empty(shape, dtype=kind, device="meta")
        check_tensors(tensors, expected, "attention")

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        self.reset()
        if not tensors:
            return
        slots = Slots(**{field.name: tensors[field.name] for field in fields(Slots)})
        held: list[tuple[Tensor, Tensor] | None] = []
        model: Any = self.model()  # which may have another dtype now than when it was tried out
        for index, layout in enumerate(self.layouts):
            if layout is None or f"keys_{index}" not in tensors:
                held.append(None)
                continue
            keys, values = tensors[f"keys_{index}"], tensors[f"values_{index}"]
            dtype = keys.dtype if model is None else model.dtype
            held.append((keys.to(dtype), values.to(dtype)))
        self._hold(slots, held)

    @property
    def rows(self) -> int | None:
        return None if self.slots is None else self.slots.batch_size

    @property
    def device(self) -> torch.device | None:
        return None if self.slots is None else self.slots.tokens.device

    @property
    def nbytes(self) -> int:
        if self.slots is None:
            return 0
        held = [tensor for layer in self.attention for tensor in (self._memory_of(layer) or ())]
        return self.slots.nbytes + sum(tensor.numel() * tensor.element_size() for tensor in held)

    @property
    def context_nbytes(self) -> int:
        """Bytes of what is known of the open conversation's tokens."""
        return sum(chunk.nbytes for chunk in self.said)

    @property
    def tokens_seen(self) -> Tensor | None:
        if self.slots is None:
            return None
        return self.slots.tokens + sum(chunk.written.sum(1) for chunk in self.said)

    def summary(self) -> dict[str, float]:
        if self.slots is None:
            return {}
        slots = self.slots
        count = slots.live.sum().clamp_min(1)
        return {
            "slots used": slots.live.sum(1).float().mean().item() / self.config.slots,
            "mean surprise kept": ((slots.surprise * slots.live).sum() / count).item(),
            "conversations": slots.conversations.float().mean().item(),
        }


def join(chunks: tuple[Columns, ...]) -> Columns:
    """All columns in order."""
    return Columns(*(torch.cat(parts, dim=1) for parts in zip(*(c.tensors().values() for c in chunks), strict=True)))


def before_context(layout: KeyLayout, rotary: torch.nn.Module | None, sharpness: float, keys: Tensor) -> Tensor:
    """Keys [B, H, M, d] at the positions -M to -1, with scores that are `sharpness` times as high.

    A key that is longer by a factor scores higher by it, whatever the attention kernel.
    """
    positions = torch.arange(-keys.shape[2], 0, device=keys.device)
    # In float32, to round once.
    return (layout.rotate(keys.float(), positions, rotary) * sharpness).to(keys.dtype)


def last_before(real: Tensor) -> Tensor:
    """For every column of real [B, T] the last real one before it, -1 where there is none."""
    column = torch.arange(real.shape[1], device=real.device)
    upto = torch.where(real, column, -1).cummax(1).values
    return torch.nn.functional.pad(upto[:, :-1], (1, 0), value=-1)


def take(states: Tensor, index: Tensor) -> Tensor:
    """Row by row, the columns index [B, M] of states [B, H, N, d]."""
    return states.gather(2, index[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))
