"""Interventions: what a model does when latents of one of its modules are other than they were."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from .hooks import Columns, by_column, replaced_output, tracked_columns
from .sparse_autoencoder import SparseAutoencoder, check_latents


MODES = ("scale", "clamp", "add", "ablate", "patch")


@dataclass(frozen=True)
class Edit:
    """What is done to latents.

    Args:
        latents: Their indices, or one index.
        mode: `"scale"`: times `value`. `"clamp"`: set to `value`. `"add"`: plus `value`. `"ablate"`: set to 0.
            `"patch"`: set to what they were in another run, `value` [T, latents] or [B, T, latents] by column of the
            text; columns that it does not have are left as they are.
        value: A number, or a tensor [latents] with one for each, or the tensor of a patch; None for `"ablate"`.
    """

    latents: int | Sequence[int] | Tensor
    mode: str
    value: float | Tensor | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode={self.mode!r} was given, but mode must be one of {MODES}")
        if self.mode == "patch":
            if not isinstance(self.value, Tensor) or self.value.dim() not in (2, 3):
                raise ValueError("mode='patch' needs a tensor [columns, latents] or [rows, columns, latents] as value")
            if self.value.shape[-1] != len(self.indices):
                raise ValueError(
                    f"mode='patch' has values for {self.value.shape[-1]} latents, but {len(self.indices)} are named"
                )
        elif self.mode == "ablate":
            if self.value is not None:
                raise ValueError(f"mode='ablate' takes no value, but {self.value!r} was given")
        elif isinstance(self.value, Tensor):
            if self.value.shape != (len(self.indices),):
                raise ValueError(
                    f"mode={self.mode!r} has a value {list(self.value.shape)} for {len(self.indices)} latents"
                )
        elif isinstance(self.value, bool) or not isinstance(self.value, (int, float)):
            raise ValueError(f"mode={self.mode!r} needs a number as value, not {self.value!r}")

    @property
    def indices(self) -> list[int]:
        """The latents, always as a list."""
        chosen = self.latents.tolist() if isinstance(self.latents, Tensor) else self.latents
        return [int(latent) for latent in chosen] if isinstance(chosen, Iterable) else [int(chosen)]

    def apply(self, latents: Tensor, columns: Columns) -> Tensor:
        """New values [B, T, n] of this edit's latents [B, T, n]."""
        if self.mode == "ablate":
            return torch.zeros_like(latents)
        if self.mode == "patch":
            return self._patched(latents, columns)
        assert self.value is not None
        value = self.value.to(latents) if isinstance(self.value, Tensor) else self.value
        if self.mode == "clamp":
            return torch.zeros_like(latents) + value
        return latents * value if self.mode == "scale" else latents + value

    def _patched(self, latents: Tensor, columns: Columns) -> Tensor:
        assert isinstance(self.value, Tensor)
        source = self.value.to(latents)[:, columns.start :] if self.value.dim() == 3 else self.value.to(latents)
        if self.value.dim() == 2:
            source = source[None, columns.start :].expand(latents.shape[0], -1, -1)
        source = expanded(source, latents.shape[0], "patch")
        covered = min(source.shape[1], latents.shape[1])
        return torch.cat([source[:, :covered], latents[:, covered:]], dim=1)


Positions = str | Sequence[int] | Tensor


@contextlib.contextmanager
def intervene(
    model: nn.Module,
    module: str | nn.Module | None,
    sae: SparseAutoencoder,
    edits: Edit | Sequence[Edit],
    *,
    positions: Positions = "all",
    rows: Sequence[bool] | Tensor | None = None,
    keep_error: bool = True,
    direction_seed: int | None = None,
    prompt_length: int | None = None,
) -> Iterator[None]:
    """Inside, the model runs with edited latents: in `forward()` and `generate()`, with a cache or without.

    A module's output t becomes t + dec(g) - dec(f), where f = enc(t) are its latents and g the edited ones: what the
    autoencoder does not explain stays, and an edit that changes nothing leaves the model bit for bit as it is.

    Args:
        model: Any Hugging Face model.
        module: A module of it, by dotted name or itself, whose first output is [B, T, d_in] or [B T, d_in]: a decoder
            layer, an attention's or MLP's output, experts, the reader of a memory, …, of the tokens that the decoder
            reads; None for the autoencoder's `hook_name`.
        edits: Applied in this order.
        positions: Where: `"all"`; `"prompt"`; `"generated"`, the tokens that `generate()` feeds back; columns of the
            text, negative ones counted from the end of the prompt, which must have them; or a bool tensor [B, T] over
            columns of the prompt. Padding counts as columns, as in `input_ids`.
        rows: For every row of the prompt batch whether it is edited; all are when None. Where `generate()` repeats rows
            (beams, return sequences), that is said of all copies of a row.
        keep_error: Whether what the autoencoder does not explain stays; False puts dec(g) in the place of t.
        direction_seed: Of a random direction that the change of t gets in place of its own, at the same length: a
            control for what any change as large would do.
        prompt_length: Columns of the prompt, where the first forward pass does not read all of it and nothing else;
            that pass when None.

    Raises:
        ValueError: when a setting is of no use, at once; in the forward pass when the activations do not fit.
    """
    chosen = [edits] if isinstance(edits, Edit) else list(edits)
    for edit in chosen:
        check_latents(edit.indices, sae)
    check_positions(positions)
    chosen_rows = None if rows is None else torch.as_tensor(rows)
    if chosen_rows is not None and (chosen_rows.dtype != torch.bool or chosen_rows.dim() != 1):
        raise ValueError(f"rows={rows!r} was given, but a bool for every row of the prompt batch is due")
    if module is None and sae.config.hook_name is None:
        raise ValueError("Name the module: the autoencoder does not know its own (config.hook_name is None)")
    place = module if module is not None else sae.config.hook_name
    assert place is not None
    direction = None if direction_seed is None else random_direction(sae.config.d_in, direction_seed)
    where = Where(positions, chosen_rows, sae.config.skip_positions)

    with tracked_columns(model, prompt_length) as columns:

        def edited(activations: Tensor) -> Tensor | None:
            return edited_activations(activations, sae, chosen, where, columns, keep_error, direction)

        with replaced_output(model, place, edited):
            yield


def check_positions(positions: Any) -> None:
    """ValueError when they are nothing that `intervene` takes."""
    if isinstance(positions, Tensor):
        if positions.dtype != torch.bool or positions.dim() != 2:
            raise ValueError(
                f"positions of {positions.dtype} {list(positions.shape)}: a bool tensor [rows, columns] is due"
            )
        return
    named = isinstance(positions, str) and positions in ("all", "prompt", "generated")
    columns = isinstance(positions, Sequence) and all(
        isinstance(column, Integral) and not isinstance(column, bool) for column in positions
    )
    if not named and not columns:
        raise ValueError(
            f"positions={positions!r} was given, but they are 'all', 'prompt', 'generated', a list of columns as "
            "integers, or a bool tensor"
        )


@dataclass
class Where:
    """The tokens that are edited: positions and rows as `intervene` takes them, without the first `skip` real ones."""

    positions: Positions
    rows: Tensor | None
    skip: int

    def chosen(self, columns: Columns) -> Tensor | None:
        """[B or 1, T] of the pass under way, by positions and rows; None for all. On the CPU: no device waits."""
        column = torch.arange(columns.start, columns.start + columns.length)
        if isinstance(self.positions, Tensor):
            chosen = torch.zeros(columns.rows, columns.length, dtype=torch.bool)
            given = expanded(self.positions.cpu(), columns.rows, "positions")[:, columns.start :]
            covered = min(given.shape[1], columns.length)
            chosen[:, :covered] = given[:, :covered]
        elif self.positions == "all":
            if self.rows is None:
                return None
            chosen = torch.ones(1, columns.length, dtype=torch.bool)
        elif self.positions == "prompt":
            chosen = (column < columns.prompt)[None]
        elif self.positions == "generated":
            chosen = (column >= columns.prompt)[None]
        else:
            assert not isinstance(self.positions, str)
            wanted = [at + columns.prompt if at < 0 else at for at in self.positions]
            if min(wanted, default=0) < 0:
                raise ValueError(
                    f"positions={[*self.positions]} were given, but the prompt has {columns.prompt} columns only"
                )
            chosen = torch.isin(column, torch.tensor(wanted, dtype=torch.long))[None]
        if self.rows is not None:
            chosen = chosen & expanded(self.rows.cpu(), columns.rows, "rows")[:, None]
        return chosen

    def without_skipped(self, chosen: Tensor | None, columns: Columns, device: torch.device) -> Tensor | None:
        """The same without the first `skip` real tokens of every row, on a device."""
        chosen = None if chosen is None else chosen.to(device)
        if not self.skip:
            return chosen
        order = torch.arange(columns.start + 1, columns.start + columns.length + 1)[None]
        kept = (order if columns.real is None else columns.real).to(device) > self.skip
        return kept if chosen is None else chosen & kept


def expanded(given: Tensor, rows: int, what: str) -> Tensor:
    """`given` [B, ...] with rows repeated where `generate()` repeated those of the prompt."""
    if given.shape[0] == rows:
        return given
    if given.shape[0] == 0 or rows % given.shape[0]:
        raise ValueError(f"The {what} are of {given.shape[0]} rows, but the batch has {rows}")
    return given.repeat_interleave(rows // given.shape[0], dim=0)


def edited_activations(
    activations: Tensor,
    sae: SparseAutoencoder,
    edits: list[Edit],
    where: Where,
    columns: Columns,
    keep_error: bool,
    direction: Tensor | None,
) -> Tensor | None:
    """What takes the place of activations [B, T, d_in] or [B T, d_in], in their shape; None where nothing is edited."""
    shape = activations.shape
    activations = by_column(activations, columns.rows, columns.length)
    chosen = where.chosen(columns)
    if chosen is not None and not bool(chosen.any()):
        return None
    mask = where.without_skipped(chosen, columns, activations.device)
    latents, change = edited_latents(sae, edits, activations, columns)
    result = activations + change.to(activations.dtype) if keep_error else sae.decode(latents).to(activations.dtype)
    if direction is not None:
        length = (result - activations).norm(dim=-1, keepdim=True)
        result = activations + length * direction.to(activations)
    return (result if mask is None else torch.where(mask[..., None], result, activations)).reshape(shape)


def edited_latents(
    sae: SparseAutoencoder, edits: list[Edit], activations: Tensor, columns: Columns
) -> tuple[Tensor, Tensor]:
    """The latents of activations [..., d_in] after edits, and what the edits add to the activations."""
    if activations.device != sae.W_dec.device:
        raise ValueError(
            f"The activations are on {activations.device}, the autoencoder on {sae.W_dec.device}: move it with sae.to()"
        )
    before = sae.encode(activations)
    after = before
    for edit in edits:
        after = after.clone()
        after[..., edit.indices] = edit.apply(after[..., edit.indices], columns)
    touched = sorted({latent for edit in edits for latent in edit.indices})
    return after, (after - before)[..., touched] @ sae.W_dec[touched] / sae.activation_scale


def random_direction(width: int, seed: int) -> Tensor:
    """A vector [width] of unit length."""
    return nn.functional.normalize(torch.randn(width, generator=torch.Generator().manual_seed(seed)), dim=0)
