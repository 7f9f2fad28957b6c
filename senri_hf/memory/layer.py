"""One memory layer of a cache, whatever its mechanism: what the cache asks of it."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING, DummyLayer


# Tokens of the open conversation that can be taken back. Assisted and prompt-lookup decoding may propose as many at
# once; by their own defaults they propose 20 and 10.
ROLLBACK_TOKENS = 64
# The name that the memory of a model itself has where adapters have theirs.
BUILT_IN = "built_in"


class MemoryLayer(DummyLayer):
    """A cache layer that holds memory and no context.

    As a `DummyLayer` it is passed by where transformers builds masks, offloads or measures the context, and reached
    by every operation on rows. Subclasses register `_layer_type` for both dynamic and static caches.

    Attributes:
        layer_idx: Index of the decoder layer that reads and writes it.
        adapter_name: Name of the adapter it belongs to.
        is_read_only: While True, nothing at all is written.
        writes_generated: Whether tokens that `generate()` produced are written too.
        keeps_graph: Whether, in training, what is written leads back to how it was computed. Without it what a
            conversation leaves is data to those after it, as after `detach`, and costs less.
        losses: Losses of the mechanism's own parts, until the trainer takes them.
        conversation_scores: In training, how much the tokens of the last pass read which past conversation
            ([B, H, T, C] by age), until the trainer takes them; mechanisms that do not tell them apart leave it None.
    """

    supports_early_init = False
    is_compileable = False
    is_croppable = True
    _layer_type: ClassVar[str | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls._layer_type is not None:
            DYNAMIC_LAYER_TYPE_MAPPING[cls._layer_type] = cls
            STATIC_LAYER_TYPE_MAPPING[cls._layer_type] = cls

    def __init__(self, layer_idx: int = 0, adapter_name: str = BUILT_IN) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.adapter_name = adapter_name
        self.is_read_only = False
        self.writes_generated = True
        self.keeps_graph = True
        self.losses: list[Tensor] = []
        self.conversation_scores: Tensor | None = None

    @property
    def rules(self) -> list[dict[str, Any]]:
        """The formulas under which its tensors were written, where another model of the same shapes may have others."""
        return []

    def bind(self, layers: list[Any]) -> None:
        """Told of all the layers of the cache it is in, whenever they are others."""

    # What a mechanism provides.

    @abstractmethod
    def map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply `function` to every tensor held; each has the batch as first dimension."""

    @abstractmethod
    def clear_context(self) -> None:
        """The conversation is over: what was staged becomes memory."""

    @abstractmethod
    def reset(self) -> None:
        """Forget everything."""

    @abstractmethod
    def rollback(self, tokens: int) -> None:
        """Take back the last `tokens` columns; ValueError when they are further back than can be taken back."""

    @abstractmethod
    def detach(self) -> None:
        """Cut the graph that leads to what was written."""

    @abstractmethod
    def copy(self) -> "MemoryLayer":
        """A layer that goes its own way from here."""

    @abstractmethod
    def decay(self, cycles: int) -> None:
        """Let `cycles` conversations pass."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """The memory as it would be after `clear_context()`; empty when there is none."""

    @abstractmethod
    def check_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """ValueError naming what in `tensors` does not fit this layer."""

    @abstractmethod
    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Hold the memory in `tensors`, already checked."""

    @property
    @abstractmethod
    def rows(self) -> int | None:
        """Rows of the batch, None while nothing is held."""

    @property
    @abstractmethod
    def device(self) -> torch.device | None:
        """Where it is held, None while nothing is held."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of memory, without the context."""

    @property
    @abstractmethod
    def tokens_seen(self) -> Tensor | None:
        """Tokens written in each row's life, [batch] int64; None while nothing is held."""

    @abstractmethod
    def summary(self) -> dict[str, float]:
        """How full the layer is, for a person: means over rows by name."""

    # What follows from that.

    @property
    def is_blank(self) -> bool:
        """Whether nothing was ever written, whatever was read."""
        seen = self.tokens_seen
        return seen is None or not bool(seen.any())

    def reset_but_frozen(self) -> None:
        """Forget everything but what is frozen, where a mechanism has that."""
        self.reset()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.map_rows(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.map_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens, as `Cache.crop` counts them."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}) was called, but tokens to remove are counted as a negative number"
            )
        if tokens_to_remove:
            self.rollback(-tokens_to_remove)

    def follow(self, device: torch.device) -> None:
        """Be where the layer is that reads it, as the layers of one model may be on several devices."""
        if self.device not in (None, device):
            self.map_rows(lambda tensor: tensor.to(device))

    def check_rows(self, batch_size: int) -> None:
        """ValueError when the memory holds another number of rows than the batch that reads it."""
        if self.rows is not None and self.rows != batch_size:
            raise ValueError(
                f"The memory holds {self.rows} row(s), but the batch has {batch_size}. Use memory.fork(n) for n "
                "continuations of every row (beams, num_return_sequences), memory.select_rows(indices) to pick rows, "
                "or a new MemoryCache.for_model(model)"
            )


def too_far_back(tokens: int, held: int) -> ValueError:
    """Of a layer that is to take back more tokens than the last `held`."""
    return ValueError(
        f"{tokens} tokens are to be taken back, but only the last {held} can be: memory keeps what it needs for "
        f"{ROLLBACK_TOKENS} tokens of the open conversation. Take a memory.snapshot() before, and restore it; in "
        f"assisted decoding have at most {ROLLBACK_TOKENS} proposed at once"
    )


class CountsContext:
    """Mixin of the first memory layer of a model in which no layer holds keys and values: it says how long the
    context is. Put it before the memory layer's own class, and transformers' `CacheLayerMixin` after that.
    """

    columns: int  # of the open conversation

    def get_seq_length(self) -> int:
        """Columns of the open conversation."""
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of context and query together, and the offset of the first of them."""
        return self.columns + query_length, 0

    def get_max_length(self) -> int:
        """-1: there is no most."""
        return -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: it begins with the first tokens."""
