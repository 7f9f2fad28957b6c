"""Where the prompt of a `generate()` ends, for memories that treat what is generated otherwise."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor


# What `generate()` takes a prompt by, the one that counts first: the mask covers what is in the cache, too.
PROMPTS = ("attention_mask", "inputs_embeds", "input_ids")


class Prompt:
    """How many columns of a prompt `generate()` has yet to feed to a model, in whatever pieces; None outside of it."""

    def __init__(self) -> None:
        self.unread: int | None = None

    @contextlib.contextmanager
    def fed(self, inputs: Tensor | None, kwargs: dict[str, Any]) -> Iterator[None]:
        """Inside, the prompt of a `generate(inputs, **kwargs)` is read: one token where it is given none."""
        given = [kwargs.get(name) for name in PROMPTS]
        sized = [g for g in (*given, inputs) if isinstance(g, Tensor) and (g.dim() == 2 or g is given[1])]
        cache = kwargs.get("past_key_values")
        held = 0 if cache is None else int(cache.get_seq_length())
        outer, self.unread = self.unread, sized[0].shape[1] - held if sized else 1
        try:
            yield
        finally:
            self.unread = outer

    def take(self, length: int, goes_on: bool) -> int | None:
        """How many of the next `length` columns, its first ones, are the prompt's; None where nobody said.

        Args:
            goes_on: Whether a cache holds what came before; without one every pass begins with the prompt.
        """
        if self.unread is None:
            return None
        taken = min(self.unread, length)
        if goes_on:
            self.unread -= taken
        return taken
