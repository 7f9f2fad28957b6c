"""Interventions: what a model does when latents of one of its modules are other than they were."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .hooks import Columns, replaced_output, tracked_columns
from .sparse_autoencoder import SparseAutoencoder


MODES = ("scale", "clamp", "add", "ablate", "patch")


@dataclass(frozen=True)
class Edit:
    """What is done to latents.

    Args:
        latents: Their indices, or one.
        mode: `"scale"`: times `value`. `"clamp"`: set to `value`. `"add"`: plus `value`. `"ablate"`: set to 0.
            `"patch"`: set to what they were in another run, `value` [T, latents] or [B, T, latents] by column of the
            text; columns that it does not have are left as they are.
        value: A number, or a tensor [latents] with one for each, or the tensor of a patch; None for `"ablate"`.
    """

    latents: int | Sequence[int]
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
        return [self.latents] if isinstance(self.latents, int) else [int(latent) for latent in self.latents]

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
    rows: Sequence[int] | None = None,
    keep_error: bool = True,
    direction_seed: int | None = None,
    prompt_length: int | None = None,
) -> Iterator[None]:
    """Inside, the model runs with edited latents: in `forward()` and `generate()`, with a cache or without.

    A module's output t becomes t + dec(g) - dec(f), where f = enc(t) are its latents and g the edited ones: what the
    autoencoder does not explain stays, and an edit that changes nothing leaves the model bit for bit as it is.

    Args:
        model: Any Hugging Face model.
        module: A module of it, by dotted name or itself, whose first output is [B, T, d_in]: a decoder layer, an
            attention's or MLP's output, the reader of a memory, …; None for the autoencoder's `hook_name`.
        edits: Applied in this order.
        positions: Where: `"all"`; `"prompt"`; `"generated"`, the tokens that `generate()` feeds back; columns of the
            text, negative ones counted from the end of the prompt; or a bool tensor [B, T] over columns of the prompt.
            Padding counts as columns, as in `input_ids`.
        rows: Rows of the prompt batch; all when None. Where `generate()` repeats rows (beams, return sequences), all
            copies of a row are meant.
        keep_error: Whether what the autoencoder does not explain stays; False puts dec(g) in the place of t.
        direction_seed: Of a random direction that the change of t gets in place of its own, at the same length: a
            control for what any change as large would do.
        prompt_length: Columns of the prompt, when it is read in several pieces; the first forward pass when None.

    Raises:
        ValueError: when a setting is of no use, at once; in the forward pass when the activations do not fit.
    """
    chosen = [edits] if isinstance(edits, Edit) else list(edits)
    d_sae = sae.W_dec.shape[0]
    for edit in chosen:
        for latent in edit.indices:
            if not 0 <= latent < d_sae:
                raise ValueError(f"Latent {latent} was named, but the autoencoder has latents 0 to {d_sae - 1}")
    if isinstance(positions, str) and positions not in ("all", "prompt", "generated"):
        raise ValueError(
            f"positions={positions!r} was given, but they are 'all', 'prompt', 'generated', columns, or a bool tensor"
        )
    if isinstance(positions, Tensor) and (positions.dtype != torch.bool or positions.dim() != 2):
        raise ValueError(
            f"positions of {positions.dtype} {list(positions.shape)}: a bool tensor [rows, columns] is due"
        )
    if module is None and sae.config.hook_name is None:
        raise ValueError("Name the module: the autoencoder does not know its own (config.hook_name is None)")
    place = module if module is not None else sae.config.hook_name
    assert place is not None
    direction = None if direction_seed is None else random_direction(sae.config.d_in, direction_seed)
    where = Where(positions, None if rows is None else list(rows), sae.config.skip_positions)

    with tracked_columns(model, prompt_length) as columns:

        def edited(activations: Tensor) -> Tensor | None:
            return edited_activations(activations, sae, chosen, where, columns, keep_error, direction)

        with replaced_output(model, place, edited):
            yield


@dataclass
class Where:
    """The tokens that are edited: positions and rows as `intervene` takes them, without the first `skip` columns."""

    positions: Positions
    rows: list[int] | None
    skip: int

    def mask(self, columns: Columns, device: torch.device) -> Tensor | None:
        """[B, T] of the pass under way; None when it is everything."""
        column = torch.arange(columns.start, columns.start + columns.length, device=device)
        if isinstance(self.positions, Tensor):
            chosen = torch.zeros(columns.rows, columns.length, dtype=torch.bool, device=device)
            given = expanded(self.positions.to(device), columns.rows, "positions")[:, columns.start :]
            covered = min(given.shape[1], columns.length)
            chosen[:, :covered] = given[:, :covered]
        elif self.positions == "all":
            chosen = torch.ones(columns.rows, columns.length, dtype=torch.bool, device=device)
        elif self.positions == "prompt":
            chosen = (column < columns.prompt).expand(columns.rows, -1)
        elif self.positions == "generated":
            chosen = (column >= columns.prompt).expand(columns.rows, -1)
        else:
            wanted = [int(at) + columns.prompt if int(at) < 0 else int(at) for at in self.positions]
            chosen = torch.isin(column, torch.tensor(wanted, device=device)).expand(columns.rows, -1)
        if self.rows is not None:
            chosen = chosen & self._row_mask(columns.rows, device)[:, None]
        if self.skip:
            chosen = chosen & (column >= self.skip)
        everything = self.positions == "all" if isinstance(self.positions, str) else False
        return None if everything and self.rows is None and not self.skip else chosen

    def _row_mask(self, rows: int, device: torch.device) -> Tensor:
        assert self.rows is not None
        mask = torch.zeros(rows, dtype=torch.bool, device=device)
        if any(not 0 <= row < rows for row in self.rows):
            raise ValueError(f"rows={self.rows} were named, but the batch has rows 0 to {rows - 1}")
        mask[self.rows] = True
        return mask


def expanded(given: Tensor, rows: int, what: str) -> Tensor:
    """`given` [B, ...] with rows repeated where `generate()` repeated those of the prompt."""
    if given.shape[0] == rows:
        return given
    if given.shape[0] == 0 or rows % given.shape[0]:
        raise ValueError(f"The {what} have {given.shape[0]} rows, but the batch has {rows}")
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
    """What takes the place of activations [B, T, d_in]; None where nothing is edited."""
    if activations.device != sae.W_dec.device:
        raise ValueError(
            f"The activations are on {activations.device}, the autoencoder on {sae.W_dec.device}: move it with sae.to()"
        )
    if activations.dim() != 3 or activations.shape[:2] != (columns.rows, columns.length):
        raise ValueError(
            f"The module returned {list(activations.shape)} where [{columns.rows}, {columns.length}, "
            f"{sae.config.d_in}] was expected: which of its tokens stand where cannot be told"
        )
    mask = where.mask(columns, activations.device)
    if mask is not None and not bool(mask.any()):
        return None
    before = sae.encode(activations)
    after = before
    for edit in edits:
        after = after.clone()
        after[..., edit.indices] = edit.apply(after[..., edit.indices], columns)
    if keep_error:
        touched = sorted({latent for edit in edits for latent in edit.indices})
        change = (after - before)[..., touched] @ sae.W_dec[touched] / sae.activation_scale
        result = activations + change.to(activations.dtype)
    else:
        result = sae.decode(after).to(activations.dtype)
    if direction is not None:
        length = (result - activations).norm(dim=-1, keepdim=True)
        result = activations + length * direction.to(activations)
    return result if mask is None else torch.where(mask[..., None], result, activations)


def random_direction(width: int, seed: int) -> Tensor:
    """A vector [width] of unit length."""
    return nn.functional.normalize(torch.randn(width, generator=torch.Generator().manual_seed(seed)), dim=0)
