"""Passes through a part of a decoder: what its other layers make of a text is known, or not asked for."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, cast

from torch import Tensor, nn


class DecoderLayers:
    """The layers of a decoder, some of which can be skipped.

    Attributes:
        layers: In order.
        in_tuples: Whether they return what they make of their input as the first item of a tuple; None until one of
            them was `seen`.
    """

    def __init__(self, decoder: nn.Module, places: dict[int, nn.Module]) -> None:
        """Of the list of a decoder's layers that has the modules `places` at their indices."""
        self.layers = next(
            list(candidate)
            for candidate in decoder.modules()
            if isinstance(candidate, nn.ModuleList)
            and all(index < len(candidate) and candidate[index] is layer for index, layer in places.items())
        )
        self.in_tuples: bool | None = None

    @contextlib.contextmanager
    def seen(self, places: list[int]) -> Iterator[dict[int, Tensor]]:
        """Inside, the inputs [B, T, D] of the layers at these indices are noted, and at their number the output."""
        found: dict[int, Tensor] = {}

        def note(index: int) -> Any:
            def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                found[index] = args[0] if args else kwargs["hidden_states"]

            return hook

        def see(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.in_tuples = isinstance(output, tuple)

        def end(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            found[len(self.layers)] = output[0] if isinstance(output, tuple) else output

        inner = [index for index in places if index < len(self.layers)]
        handles = [self.layers[index].register_forward_pre_hook(note(index), with_kwargs=True) for index in inner]
        handles.append(self.layers[-1].register_forward_hook(end))
        if self.in_tuples is None:
            handles.append(self.layers[0].register_forward_hook(see))
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def skipped(self, start: int, stop: int | None, states: Tensor | None = None) -> Iterator[None]:
        """Inside, the layers from `start` up to `stop`, or all to the end, compute nothing: each hands on what it gets.

        Args:
            states: [B, T, D], handed on by the last of them instead.

        Raises:
            RuntimeError: while it is not known what these layers return.
        """
        skipped = self.layers[start:stop]
        if skipped and self.in_tuples is None:
            raise RuntimeError("Layers cannot be skipped before one of them was seen at work")
        before = [layer.__dict__.get("forward") for layer in skipped]
        for layer in skipped:
            given = states if layer is skipped[-1] else None
            layer.forward = functools.partial(hand_on, given, cast(bool, self.in_tuples))  # type: ignore[method-assign]
        try:
            yield
        finally:
            for layer, forward in zip(skipped, before, strict=True):
                if forward is None:
                    del layer.forward
                else:  # another wrapper's own
                    layer.forward = forward  # type: ignore[method-assign]


def hand_on(states: Tensor | None, in_tuple: bool, *args: Any, **kwargs: Any) -> Any:
    """A decoder layer's output that is `states`, or its input where these are None."""
    hidden = states if states is not None else args[0] if args else kwargs["hidden_states"]
    return (hidden,) if in_tuple else hidden
