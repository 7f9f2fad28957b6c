"""An attention layer's part of a cache: the context, and before it a memory of keys and values."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


class KeyValueLayer(DynamicLayer):
    """A dynamic cache layer in which remembered keys and values stand before those of the context.

    To attention, the memory is what was said just before the context: its columns come first, its positions are
    negative, and a sliding window slides over both. `get_seq_length()` counts the context only.

    Args:
        sliding_window: Tokens that attention sees in this layer, itself included; None for all of them.
    """

    keys: Any  # None or empty until the first tokens
    values: Any

    def __init__(self, sliding_window: int | None = None) -> None:
        super().__init__()
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        # The memory as it is kept: keys at position 0. In a conversation it stands, moved, before the context.
        self.memory_keys: Tensor | None = None  # [B, H, M, d]
        self.memory_values: Tensor | None = None
        self.move: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def like(cls, layer: Any) -> "KeyValueLayer":
        """A layer that takes the place of one of transformers' own dynamic layers.

        Raises:
            ValueError: for a layer of another kind.
        """
        if type(layer) is DynamicLayer:
            return cls()
        if type(layer) is DynamicSlidingWindowLayer:
            return cls(layer.sliding_window)
        raise ValueError(f"its cache has a {type(layer).__name__}, which holds more than keys and values of tokens")

    @property
    def memory_length(self) -> int:
        return 0 if self.memory_keys is None else self.memory_keys.shape[-2]

    @property
    def columns(self) -> int:
        """Columns of memory and context together."""
        return self.keys.shape[-2] if self.is_initialized and self.keys.dim() > 1 else self.memory_length

    def remember(self, keys: Tensor, values: Tensor, move: Callable[[Tensor], Tensor]) -> None:
        """Hold a memory, and an empty context.

        Args:
            keys, values: [B, H, M, d] as they are kept. move: Gives the keys at the positions at which they are read.
        """
        self.reset()
        self.memory_keys, self.memory_values, self.move = keys, values, move

    def forget(self) -> None:
        """Hold no memory and no context."""
        self.memory_keys = self.memory_values = self.move = None
        self.reset()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Begin a conversation."""
        super().lazy_initialization(key_states, value_states)
        if self.memory_keys is not None and self.move is not None:
            self.keys, self.values = self.move(self.memory_keys), self.memory_values

    def context(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the context alone."""
        if not self.is_initialized:
            return torch.empty(0), torch.empty(0)
        return self.keys[..., self.memory_length :, :], self.values[..., self.memory_length :, :]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        visible, _ = self.get_mask_sizes(key_states.shape[-2])
        keys, values = super().update(key_states, value_states)
        return keys[..., -visible:, :], values[..., -visible:, :]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        seen = self.columns
        # With memory all columns are handed out: where padding stands before the context, the window, which slides
        # over positions, may reach further back than as many columns.
        if self.sliding_window is not None and not self.memory_length:
            seen = min(seen, self.sliding_window - 1)
        return seen + query_length, self.columns - seen

    def get_seq_length(self) -> int:
        return self.columns - self.memory_length if self.is_initialized else 0

    def crop(self, tokens_to_remove: int) -> None:
        if -tokens_to_remove > self.get_seq_length():
            raise ValueError(
                f"{-tokens_to_remove} tokens are to be taken back, but the context has {self.get_seq_length()}"
            )
        super().crop(tokens_to_remove)

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply `function` to every tensor held; each has the batch as first dimension."""
        if self.is_initialized and self.keys.dim() > 1:
            self.keys, self.values = function(self.keys), function(self.values)
            self.device = self.keys.device
        if self.memory_keys is not None and self.memory_values is not None:
            self.memory_keys, self.memory_values = function(self.memory_keys), function(self.memory_values)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.map(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))
