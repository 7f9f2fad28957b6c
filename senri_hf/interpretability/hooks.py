"""Modules by name, and what comes out of them."""

import contextlib
import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn


# What PEFT puts before the names of a model's modules.
WRAPPER = "base_model.model."


def find_module(model: nn.Module, module: str | nn.Module) -> nn.Module:
    """A module of a model by its dotted name, with or without PEFT's prefix; a module is returned as it is.

    Raises:
        ValueError: when there is none, naming those with similar names.
    """
    if isinstance(module, nn.Module):
        return module
    modules = dict(model.named_modules())
    for name in (module, WRAPPER + module):
        if name in modules:
            return modules[name]
    alike = difflib.get_close_matches(module, [name.removeprefix(WRAPPER) for name in modules], n=4, cutoff=0.5)
    raise ValueError(
        f"{type(model).__name__} has no module {module!r}. "
        + (f"Similar ones: {', '.join(alike)}" if alike else "model.named_modules() lists those that it has")
    )


def first_tensor(output: Any) -> Tensor:
    """The tensor that a module returned, or the first of those in a tuple, a list, a dict or a dataclass.

    Raises:
        ValueError: when it returned none.
    """
    if isinstance(output, Tensor):
        return output
    values: Any = output if isinstance(output, (tuple, list)) else ()
    if isinstance(output, dict):
        values = output.values()
    elif is_dataclass(output):
        values = [getattr(output, f.name) for f in fields(output)]
    for value in values:
        if isinstance(value, Tensor):
            return value
    raise ValueError(f"The module returned {type(output).__name__}, in which there is no tensor to look at")


def with_first_tensor(output: Any, tensor: Tensor) -> Any:
    """The same output with its first tensor replaced."""
    if isinstance(output, Tensor):
        return tensor
    if isinstance(output, dict):
        name = next(name for name, value in output.items() if isinstance(value, Tensor))
        changed = type(output)(**output)
        changed[name] = tensor
        return changed
    if is_dataclass(output):
        name = next(f.name for f in fields(output) if isinstance(getattr(output, f.name), Tensor))
        return replace(output, **{name: tensor})  # type: ignore[type-var]
    index = next(index for index, value in enumerate(output) if isinstance(value, Tensor))
    return type(output)([*output[:index], tensor, *output[index + 1 :]])


@contextlib.contextmanager
def replaced_output(
    model: nn.Module, module: str | nn.Module, function: Callable[[Tensor], Tensor | None]
) -> Iterator[nn.Module]:
    """Inside, what a module returns is what `function` makes of it; None leaves it as it is."""
    target = find_module(model, module)

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        changed = function(first_tensor(output))
        return None if changed is None else with_first_tensor(output, changed)

    handle = target.register_forward_hook(hook)
    try:
        yield target
    finally:
        handle.remove()


class _ReachedError(Exception):
    """The forward pass got as far as it was wanted."""


@contextlib.contextmanager
def captured(model: nn.Module, module: str | nn.Module, stop: bool = False) -> Iterator[list[Tensor]]:
    """A list to which every output of a module is appended, detached.

    Args:
        stop: Leave the forward pass there, and the `with` block with it: nothing after the module is computed.
    """
    outputs: list[Tensor] = []

    def take(tensor: Tensor) -> None:
        outputs.append(tensor.detach())
        if stop:
            raise _ReachedError

    with replaced_output(model, module, take), contextlib.suppress(_ReachedError):
        yield outputs


@dataclass
class Columns:
    """Which columns of a text the forward pass under way reads.

    Attributes:
        start: Columns that were read before, and are in the cache.
        length: Columns of this pass.
        prompt: Columns of the prompt: those of the first pass, unless they were said.
        given: The prompt's length where it was said.
        rows: Rows of the batch.
        real: Number of real tokens of the row up to each column of this pass, [B, length]; None where all are real.
        seen: Ids of the prompt; without a cache they tell whether a pass goes on with the same text.
    """

    start: int = 0
    length: int = 0
    prompt: int = 0
    given: int | None = None
    rows: int = 0
    real: Tensor | None = field(default=None, repr=False)
    seen: Tensor | None = field(default=None, repr=False)

    def note(self, ids: Tensor | None, embeds: Tensor | None, cached: int | None, mask: Any = None) -> None:
        """Take in a pass over ids [B, T], or embeddings [B, T, D].

        Args:
            cached: Columns before, None without a cache.
            mask: 0 where there is padding, [B, cached + T]; anything of another shape says nothing.
        """
        tokens = ids if ids is not None else embeds
        assert tokens is not None
        goes_on = bool(cached) and self.prompt > 0
        if cached is None and ids is not None and self.seen is not None:
            before = self.seen.shape[1]
            goes_on = self.seen.shape[0] == ids.shape[0] and before < ids.shape[1]
            goes_on = goes_on and torch.equal(ids[:, :before], self.seen)
        self.rows, self.length = tokens.shape[:2]
        self.start = cached or 0
        told = isinstance(mask, Tensor) and mask.shape == (self.rows, self.start + self.length)
        self.real = mask.long().cumsum(-1)[:, self.start :] if told else None
        if not goes_on:
            self.prompt = self.start + self.length if self.given is None else self.given
            self.seen = ids if cached is None else None


@contextlib.contextmanager
def tracked_columns(model: nn.Module, prompt_length: int | None = None) -> Iterator[Columns]:
    """Inside, the returned `Columns` follow the model's forward passes."""
    columns = Columns(given=prompt_length)
    get_decoder: Any = getattr(model, "get_decoder", None)
    decoder = None if get_decoder is None else get_decoder()
    reader = decoder if isinstance(decoder, nn.Module) else model

    def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        if ids is None and embeds is None and args:
            ids = args[0]
        if ids is None and embeds is None:
            raise ValueError("The model was called without input_ids and inputs_embeds, so no position is known")
        cache = kwargs.get("past_key_values")
        cached = None if cache is None else int(cache.get_seq_length())
        columns.note(ids, embeds, cached, kwargs.get("attention_mask"))

    handle = reader.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield columns
    finally:
        handle.remove()
