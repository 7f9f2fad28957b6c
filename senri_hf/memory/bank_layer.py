"""The cache layer of the bank mechanism: what routing keeps of a conversation.

A bank's memory tokens are weights and outlive everything. What a cache holds of it is the running or windowed mean by
which tokens are routed: it belongs to the conversation and ends with it.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..configuration import BankConfig
from .bank_router import RouterState, advance
from .layer import BUILT_IN, ROLLBACK_TOKENS, MemoryLayer, too_far_back
from .state import RowState, check_tensors


@dataclass(frozen=True)
class Columns(RowState):
    """Columns of tokens that may yet be taken back."""

    x: Tensor  # [B, T, D]
    real: Tensor  # [B, T]
    counted: Tensor  # [B, T] those of them that count as seen

    @property
    def length(self) -> int:
        return self.real.shape[1]


@dataclass(frozen=True)
class Conversation:
    """A conversation's routing state now, an older one, and the columns between the two.

    The older one lies at least `ROLLBACK_TOKENS` columns back, or at the conversation's start.
    """

    now: RouterState
    older: RouterState
    between: tuple[Columns, ...] = ()

    def map(self, function: Callable[[Any], Any]) -> "Conversation":
        """Apply `function` to every RowState."""
        return Conversation(function(self.now), function(self.older), tuple(map(function, self.between)))


class BankLayer(MemoryLayer):
    """Routing state of one memory layer, for the rows of a batch.

    What it saves is how many tokens every row has seen: between conversations nothing else is left.
    """

    _layer_type = "bank_memory"
    # Static caches of attention stay what they are with these beside them: masks are made by this.
    is_compileable = True

    def __init__(
        self,
        config: BankConfig | None = None,
        layer_idx: int = 0,
        adapter_name: str = BUILT_IN,
        **kwargs: Any,
    ) -> None:
        super().__init__(layer_idx, adapter_name)
        self.config = config if config is not None else BankConfig()
        self.seen: Tensor | None = None  # [B] int64
        self.open: Conversation | None = None

    @property
    def window(self) -> int:
        """Tokens that are kept one by one; both strategies may be in use in turn."""
        windowed = {"rolling", "hybrid"} & set(self.config.routing_strategies)
        return self.config.routing_window_size if windowed else 0

    def routing_state(self, x: Tensor, prompt_lengths: Tensor | None = None) -> RouterState:
        """What came before the tokens x [B, T, D] in their conversation."""
        self._begin(x)
        assert self.open is not None
        if prompt_lengths is not None:
            lengths = prompt_lengths
            self.open = replace(
                self.open, now=self.open.now.with_prompt(lengths), older=self.open.older.with_prompt(lengths)
            )
        return self.open.now

    def append(self, x: Tensor, real: Tensor) -> None:
        """Take in the next columns x [B, T, D], of which `real` [B, T] are no padding."""
        self._begin(x)
        assert self.open is not None and self.seen is not None
        counted = torch.zeros_like(real) if self.is_read_only else real
        self.seen = self.seen + counted.sum(1)
        if not self.config.use_chapters:
            x = x[..., :0]  # nothing is routed, but what is taken back is still counted
        now, older, between = self.open.now, self.open.older, self.open.between
        columns = Columns(x, real, counted)
        old = columns.length - ROLLBACK_TOKENS
        if old > 0:  # too far back ever to be taken back: not kept one by one
            older = now = advance(now, x[:, :old], real[:, :old])
            # A view would keep the others alive.
            columns, between = columns.map(lambda tensor: tensor[:, old:].clone()), ()
        between = (*between, columns)
        held = sum(chunk.length for chunk in between)
        while held - between[0].length >= ROLLBACK_TOKENS:
            older, held = advance(older, between[0].x, between[0].real), held - between[0].length
            between = between[1:]
        self.open = Conversation(advance(now, columns.x, columns.real), older, between)

    def rollback(self, tokens: int) -> None:
        if self.open is None or tokens == 0:
            return
        held = sum(chunk.length for chunk in self.open.between)
        if tokens > held:
            raise too_far_back(tokens, held)
        chunks = zip(*(chunk.tensors().values() for chunk in self.open.between), strict=True)
        columns = Columns(*(torch.cat(parts, dim=1) for parts in chunks))
        assert self.seen is not None
        self.seen = self.seen - columns.counted[:, held - tokens :].sum(1)
        kept = columns.map(lambda tensor: tensor[:, : held - tokens])
        self.open = Conversation(advance(self.open.older, kept.x, kept.real), self.open.older, (kept,))

    def clear_context(self) -> None:
        self.open = None

    def reset(self) -> None:
        self.open, self.seen = None, None

    def decay(self, cycles: int) -> None:
        """Nothing: a bank does not fade."""

    def detach(self) -> None:
        """Cut the graph that leads to what was read."""
        if self.open is not None:
            self.open = self.open.map(lambda part: part.detach())

    def map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.seen is not None:
            self.seen = function(self.seen)
        if self.open is not None:
            self.open = self.open.map(lambda part: part.map(function))

    def copy(self) -> "BankLayer":
        """A layer that goes its own way from here. Tensors are shared: they are never changed in place."""
        layer = copy.copy(self)
        layer.losses = []
        return layer

    def state_dict(self) -> dict[str, Tensor]:
        return {"tokens": self.seen} if self.seen is not None and bool(self.seen.any()) else {}

    def check_state_dict(self, tensors: dict[str, Tensor]) -> None:
        if tensors:
            rows = tensors["tokens"].numel() if "tokens" in tensors else 1
            expected = torch.empty(max(rows, 1), dtype=torch.long, device="meta")
            check_tensors(tensors, {"tokens": expected}, f"layer {self.layer_idx}")

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        self.reset()
        self.seen = tensors.get("tokens")

    @property
    def rows(self) -> int | None:
        return None if self.seen is None else self.seen.shape[0]

    @property
    def device(self) -> torch.device | None:
        return None if self.seen is None else self.seen.device

    @property
    def nbytes(self) -> int:
        """Bytes of the routing state now and of the older one; the bank itself is weights of the model.

        The last tokens that may be taken back are working space on top, `2 * ROLLBACK_TOKENS` columns and those of one
        pass at most.
        """
        held = 0 if self.open is None else self.open.now.nbytes + self.open.older.nbytes
        return held + (0 if self.seen is None else self.seen.numel() * self.seen.element_size())

    @property
    def tokens_seen(self) -> Tensor | None:
        return self.seen

    def summary(self) -> dict[str, float]:
        if self.open is None:
            return {}
        return {"tokens that route": float(self.open.now.count.float().mean())}

    def _begin(self, x: Tensor) -> None:
        self.check_rows(x.shape[0])
        self.follow(x.device)
        if self.seen is None:
            self.seen = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
        if self.open is None:
            size = x.shape[-1] if self.config.use_chapters else 0
            state = RouterState.empty(x.shape[0], size, self.window, x)
            self.open = Conversation(state, state)


def prompt_lengths(real: Tensor, column: int, layer: BankLayer | None) -> Tensor | None:
    """How many tokens of each row are the prompt, [B], where that ends before a column of the pass `real` [B, T].

    Args:
        layer: What came before, in the cache; nothing when None.

    Returns:
        -1 for rows of which nothing was read before that column: it begins with the prompt. None when all is prompt.
    """
    if column == real.shape[1]:
        return None
    count = real[:, :column].sum(1)
    if layer is not None and layer.open is not None:
        count = count + layer.open.now.count.to(real.device)
    return torch.where(count > 0, count, -1)
