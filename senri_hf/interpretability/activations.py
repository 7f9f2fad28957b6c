"""Activations as they come out of a model: streamed, shuffled in memory, never on disk."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from .hooks import by_column, captured


Batch = dict[str, Any]


def real_positions(batch: Batch, skip: int = 0) -> Tensor:
    """[B, T] the tokens of a batch that are no padding, without the first `skip` ones of every row."""
    ids = batch["input_ids"]
    mask = batch.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    return real & (real.cumsum(-1) > skip)


@torch.no_grad()
def module_activations(
    model: nn.Module,
    module: str | nn.Module,
    batches: Iterable[Batch],
    *,
    skip_positions: int = 0,
    start: int = 0,
    run: Callable[[Batch], Any] | None = None,
) -> Iterator[Tensor]:
    """What a module returns for the real tokens of batches, [tokens, d] for each.

    Args:
        module: Its dotted name, or itself; its first output is looked at, [B, T, d], or [B T, d] as experts and some
            MLPs give it. Modules that see other tokens than `input_ids` (the encoder of an encoder-decoder) are not
            supported.
        batches: Arguments of the model, with `input_ids` [B, T] and `attention_mask` where there is padding.
        skip_positions: Real tokens at the start of every row that are left out.
        start: Batches to pass over without running the model.
        run: What to do with a batch instead of `model(**batch)`, of which only the part up to the module is computed:
            to read with a memory, say. The module has to be reached once.
    """
    for index, batch in enumerate(batches):
        if index < start:
            continue
        with captured(model, module, stop=run is None) as outputs:
            (run or (lambda inputs: model(**inputs)))(batch)
        if len(outputs) != 1:
            raise ValueError(f"The module was reached {len(outputs)} times for one batch, where once was expected")
        real = real_positions(batch, skip_positions)
        yield by_column(outputs[0], *real.shape)[real.to(outputs[0].device)]


class ActivationStream(IterableDataset[dict[str, Tensor]]):
    """Batches of activations in random order, out of a buffer in memory that a source refills.

    When the buffer is full, a random half of it is dealt out in batches, and the source fills it up again. Where the
    source ends it begins anew, so that the stream has no end.

    Args:
        source: Called with the number of its items to pass over; gives activations [n, d], item by item.
        batch_size: Activations of a batch.
        buffer_size: Activations held, at least two batches.
        reuse: How often each activation is dealt out, in another order each time.
        seed: Of the order.

    Yields:
        `{"activations": [batch_size, d]}`
    """

    def __init__(
        self,
        source: Callable[[int], Iterable[Tensor]],
        batch_size: int,
        buffer_size: int,
        reuse: int = 1,
        seed: int = 0,
    ) -> None:
        if batch_size < 1 or buffer_size < 2 * batch_size or reuse < 1:
            raise ValueError(
                f"batch_size={batch_size}, buffer_size={buffer_size} and reuse={reuse} were given; all must be at "
                "least 1, and the buffer must hold at least two batches"
            )
        self.source, self.batch_size, self.buffer_size = source, batch_size, buffer_size
        self.reuse, self.seed = reuse, seed
        self.consumed = 0  # items of the source that were read in its present pass
        self.fills = 0
        self._began, self._found = 0, 0  # the present pass: its first item, and the activations that it gave so far
        self._held: Tensor | None = None
        self._items: Iterator[Tensor] | None = None

    def state(self) -> dict[str, int]:
        """Where the stream is, without what it holds."""
        return {"consumed": self.consumed, "fills": self.fills}

    def resume(self, state: dict[str, int]) -> None:
        """Go on at a `state()`: the source goes on where it was, and the buffer fills anew."""
        self.consumed, self.fills = state["consumed"], state["fills"]
        self._held, self._items = None, None

    def peek(self) -> Tensor:
        """The full buffer [n, d], without dealing anything out."""
        if self._held is None:
            self._fill()
        assert self._held is not None
        return self._held

    def _fill(self) -> None:
        """Read from the source until the buffer is full."""
        parts = [] if self._held is None else [self._held]
        count = sum(len(part) for part in parts)
        while count < self.buffer_size:
            if self._items is None:
                self._items, self._began, self._found = iter(self.source(self.consumed)), self.consumed, 0
            item = next(self._items, None)
            if item is None:
                if not self._found and self._began == 0:
                    raise ValueError("The source of activations is empty")
                self.consumed, self._items = 0, None
                if count >= 2 * self.batch_size:  # all of it is here
                    break
                continue
            self.consumed += 1
            self._found += len(item)
            parts.append(item)
            count += len(item)
        self._held = torch.cat(parts)
        self.fills += 1

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            held = self.peek()
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.fills)
            order = torch.randperm(len(held), generator=generator)
            whole = self._items is None  # the source ended: nothing is to be mixed in
            dealt = order if whole else order[: max(self.batch_size, len(held) // 2)]
            for _ in range(self.reuse):
                turn = dealt[torch.randperm(len(dealt), generator=generator)]
                for start in range(0, len(turn) - self.batch_size + 1, self.batch_size):
                    yield {"activations": held[turn[start : start + self.batch_size]]}
            self._held = None if whole else held[order[len(dealt) :]]
            self._fill()
