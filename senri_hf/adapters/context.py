"""What the hooks of one model share during a forward pass."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ..memory import MemoryCache, MemoryLayer
from ..memory.cache import layer_in
from ..memory.layer import ROLLBACK_TOKENS
from ..memory.layout import Layout
from ..memory.prompt import Prompt
from ..memory.real_tokens import AfterEnd, document_starts, real_tokens


@dataclass
class ForwardContext:
    """One forward pass of one model; empty between passes.

    Attributes:
        num_heads: Attention heads of the model; `model` makes logits of hidden states.
        model_takes_prompt_lengths: Whether the model itself is to be told where prompts end, as one with a bank of its
            own is.
        memory: The cache of this pass, if it is a memory cache.
        ids: [B, T] its token ids, where they were given.
        logits_to_keep: How many of the last tokens are asked for their logits, where that was said.
        prompt_lengths: [B] how many real tokens of every row are its prompt, where that was said.
        generated_from: The first column of this pass that `generate()` produced, T where there is none. Where nobody
            said where the prompt ends, a single token counts as such with a cache that is no memory cache, also where
            it is the first.
        prompt: Where the prompt of the `generate()` that is going on ends.
        given: The decoder's arguments by name.
        cache: The cache of this pass, whatever it is.
        past: How many columns attention sees before this pass: the context, and memory's own in front of it.
        adapter_name: The adapter whose block is being called.
        shared: What blocks of different layers hand on to each other.
        waiting: What blocks left to be done when the last hidden states are known (see `at_end`).
    """

    num_heads: int
    model: PreTrainedModel | None = None
    model_takes_prompt_lengths: bool = False
    memory: MemoryCache | None = None
    ids: Tensor | None = None
    logits_to_keep: Any = None
    prompt_lengths: Tensor | None = None
    generated_from: int = 0
    prompt: Prompt = field(default_factory=Prompt)
    past: Any = 0
    given: dict[str, Any] = field(default_factory=dict)
    waiting: dict[Callable[..., None], list[Any]] = field(default_factory=dict)
    found: tuple[Tensor, bool] | None = None
    taken: dict[tuple[bool, bool], Tensor] = field(default_factory=dict)
    cache: Cache | None = None
    adapter_name: str = ""
    shared: dict[Any, Any] = field(default_factory=dict)
    streams: Layout | None = None

    def clear(self) -> None:
        self.memory, self.ids, self.found, self.streams, self.cache = None, None, None, None, None
        self.given, self.waiting, self.shared, self.taken = {}, {}, {}, {}
        self.logits_to_keep, self.prompt_lengths, self.generated_from = None, None, 0

    def begin(self, given: dict[str, Any]) -> None:
        """Note what a pass was given; with a memory cache, refuse what it could not take in."""
        said = self.logits_to_keep, self.prompt_lengths
        self.clear()
        self.given, self.ids, (self.logits_to_keep, self.prompt_lengths) = given, given.get("input_ids"), said
        cache = next((value for value in given.values() if isinstance(value, Cache)), None)
        self.cache = cache
        past = 0 if cache is None else cache.get_seq_length()
        self.past = past.clone() if isinstance(past, Tensor) else past  # a static cache counts on in place
        if isinstance(cache, MemoryCache) and cache.attention_memory is not None:
            self.past = cache.get_query_offset()  # masks were widened by then
        batch, length = self.tokens.shape[:2]
        self.generated_from = self._first_generated(cache, length)
        if not isinstance(cache, MemoryCache):
            return
        for layer in cache.memory_layers:  # before attention has taken anything in
            layer.check_rows(batch)
        self.memory = cache
        _ = self.real

    def _first_generated(self, cache: Cache | None, length: int) -> int:
        """`generated_from` of a pass of `length` columns."""
        guessed = length if cache is None else length - self._generated(cache, length)
        said = self.prompt.take(length, goes_on=cache is not None)
        return guessed if said is None else said

    def _generated(self, cache: Cache, length: int) -> int:
        """How many of this pass's columns `generate()` produced, its last ones, where nobody said.

        A single token that continues a context is what decoding feeds. Assisted decoding asks for the logits of its
        candidates and of the token before them, which is the prompt's last one in the first pass only; whether it is
        that which asks only a memory cache knows.
        """
        has_memory = isinstance(cache, MemoryCache)
        if length == 1 and not has_memory:
            return 1  # a static cache's length is a tensor, for which the device would have to be waited for
        may_ask = cache.is_recording if isinstance(cache, MemoryCache) else True
        asked = self.logits_to_keep if may_ask and isinstance(self.logits_to_keep, int) else 1
        asked = 1 if length == 1 else max(asked, 1)
        if asked > ROLLBACK_TOKENS + 1 and has_memory:
            raise ValueError(
                f"{asked - 1} candidates were proposed at once, but memory can take back {ROLLBACK_TOKENS} tokens at "
                "most. Set prompt_lookup_num_tokens, or the assistant's num_assistant_tokens, to no more"
            )
        return length if asked == length and cache.get_seq_length() > 0 else min(asked - 1, length)

    @property
    def tokens(self) -> Tensor:
        """Ids [B, T], or embeddings [B, T, D] where there are none."""
        return self.ids if self.ids is not None else self.given["inputs_embeds"]

    @property
    def real(self) -> Tensor:
        """[B, T] the tokens that are no padding."""
        return self._find_real()[0]

    @property
    def all_real(self) -> bool:
        """Whether all tokens are real without having looked."""
        return self._find_real()[1]

    def _find_real(self) -> tuple[Tensor, bool]:
        if self.found is None:
            given = self.given
            mask, positions = given.get("attention_mask"), given.get("position_ids")
            real, all_real = real_tokens(self.tokens, mask, positions, given, self.past)
            if self.memory is not None and self.ids is not None:
                real = real & ~self.after_end.among(self.ids, self.memory.recent_decoded)
                all_real = all_real and self.ids.shape[1] == 1
            self.found = real, all_real
        return self.found

    @property
    def after_end(self) -> AfterEnd:
        """What follows a row that has ended; asked anew in every pass, as a model's configs may change."""
        model: Any = self.model
        if model is None:
            return AfterEnd()
        return AfterEnd.of(getattr(model, "generation_config", None), model.config.get_text_config(decoder=True))

    @property
    def tokens_and_documents(self) -> tuple[Tensor, Tensor | None]:
        """[B, T] the tokens that are no padding, and where documents begin that share a row; None for no such rows.

        Raises:
            ValueError: for packed documents with a cache, in which rows go on.
        """
        if self.cache is None:
            given = self.given
            starts = document_starts(self.tokens, given.get("attention_mask"), given.get("position_ids"), given)
            if starts is not None:
                return torch.ones_like(starts), starts
        return self.real, None

    def layer_in_any_cache(
        self, layer_idx: int, new_cache_layer: Callable[[int, str], MemoryLayer]
    ) -> MemoryLayer | None:
        """The state of the block that is being called, in a cache that is no memory cache; None without a cache."""
        if self.cache is None or self.model is None:
            return None
        attention_layers = self.model.config.get_text_config(decoder=True).num_hidden_layers
        return layer_in(self.cache, layer_idx, self.adapter_name, new_cache_layer, attention_layers)

    def layout(self, columns: slice) -> Layout:
        """How some columns of this pass become streams of real tokens."""
        real = self.real[:, columns]
        if real.shape != self.real.shape:
            return Layout.of(real)
        if self.streams is None:
            self.streams = Layout.of(real)
        return self.streams

    def stretches(self, memory: MemoryLayer) -> list[tuple[slice, bool]]:
        """The columns of this pass in order, and whether a memory takes in the real ones among them: all at once, but
        where candidates that it does not take in come with their prompt.
        """
        length = self.real.shape[1]
        first = length if memory.writes_generated else self.generated_from
        parts = [(slice(0, first), not memory.is_read_only), (slice(first, length), False)]
        return [part for part in parts if part[0].stop > part[0].start] or parts[:1]

    def written(self, memory: MemoryLayer) -> Tensor:
        """[B, T] the tokens of this pass that a memory takes in; found once for all layers of the same kind."""
        kind = memory.writes_generated, memory.is_read_only
        if kind not in self.taken:
            parts = [self.real[:, columns] & writes for columns, writes in self.stretches(memory)]
            self.taken[kind] = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return self.taken[kind]

    def at_end(self, function: Callable[[list[Any], Tensor, "ForwardContext"], None], item: Any) -> None:
        """Have `function(items, last hidden states [B, T, D], context)` called once when the decoder is done.

        It gets the items of all blocks that named the same function.
        """
        self.waiting.setdefault(function, []).append(item)

    def finish(self, output: Any) -> None:
        """Do what waited for the decoder's output, and forget the pass; None for a pass that failed."""
        if output is not None:
            for function, items in self.waiting.items():
                function(items, output[0] if isinstance(output, tuple) else output.last_hidden_state, self)
            if self.memory is not None:
                self.memory.note_tokens(self.ids)
        self.clear()
