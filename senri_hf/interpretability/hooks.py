"""Modules by name, and what comes out of them."""

import contextlib
import difflib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation.utils import ALL_CACHE_NAMES


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


class CacheColumns:
    """How many columns of a text caches hold: as they say, or as seen, since those of state-space models cannot say."""

    def __init__(self) -> None:
        self.counted: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def of(self, cache: Any) -> int:
        """Columns that a cache holds.

        Raises:
            ValueError: when it does not say so, and was filled where nobody counted.
        """
        if self._says(cache):
            return int(cache.get_seq_length())
        if cache in self.counted:
            return self.counted[cache]
        if hasattr(cache, "has_previous_state") and not cache.has_previous_state():
            return 0
        raise ValueError(
            f"A {type(cache).__name__} was given that holds a text already and does not say how long it is: which "
            "tokens stand where cannot be told. Begin with an empty cache inside the `with` block"
        )

    def note(self, cache: Any, columns: int) -> None:
        """Remember what a cache holds that cannot say so; a list of tensors is no cache that could be known again."""
        if not self._says(cache):
            with contextlib.suppress(TypeError):
                self.counted[cache] = columns

    @staticmethod
    def _says(cache: Any) -> bool:
        # Without a layer of attention there is nothing that could be counted.
        return hasattr(cache, "get_seq_length") and not (getattr(cache, "is_linear", None) and all(cache.is_linear))


def cache_in(values: dict[str, Any]) -> Any:
    """The cache among a model's arguments or in its output, whatever the model calls it; None where there is none."""
    return next((values[name] for name in ALL_CACHE_NAMES if values.get(name) is not None), None)


@contextlib.contextmanager
def tracked_columns(model: nn.Module, prompt_length: int | None = None) -> Iterator[Columns]:
    """Inside, the returned `Columns` follow the model's forward passes."""
    columns, caches = Columns(given=prompt_length), CacheColumns()
    get_decoder: Any = getattr(model, "get_decoder", None)
    decoder = None if get_decoder is None else get_decoder()
    reader = decoder if isinstance(decoder, nn.Module) else model

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        if ids is None and embeds is None and args:
            ids = args[0]
        if ids is None and embeds is None:
            raise ValueError("The model was called without input_ids and inputs_embeds, so no position is known")
        cache = cache_in(kwargs)
        columns.note(ids, embeds, None if cache is None else caches.of(cache), kwargs.get("attention_mask"))

    def after(_module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        cache = cache_in({**kwargs, **(output if isinstance(output, dict) else {})})
        if cache is not None:
            caches.note(cache, columns.start + columns.length)

    handles = [
        reader.register_forward_pre_hook(before, with_kwargs=True),
        reader.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        yield columns
    finally:
        for handle in handles:
            handle.remove()


def by_column(activations: Tensor, rows: int, length: int) -> Tensor:
    """Activations [B, T, d] of a pass over B rows of T columns, from modules too that take all tokens as one list.

    Raises:
        ValueError: when they are neither [B, T, d] nor [B T, d].
    """
    if activations.dim() == 2 and activations.shape[0] == rows * length:
        return activations.unflatten(0, (rows, length))
    if activations.dim() != 3 or activations.shape[:2] != (rows, length):
        raise ValueError(
            f"The module returned {list(activations.shape)} where [{rows}, {length}, d] was expected: which of its "
            "tokens stand where cannot be told"
        )
    return activations
