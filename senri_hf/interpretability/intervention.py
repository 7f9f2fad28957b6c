"""Interventions: what a model does when latents of one of its modules are other than they were."""

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

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
        value: A number, or the tensor of a patch; None for `"ablate"`.
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
        if isinstance(self.value, Tensor):
            return self._patched(latents, columns)
        assert self.value is not None
        if self.mode == "clamp":
            return torch.full_like(latents, self.value)
        return latents * self.value if self.mode == "scale" else latents + self.value

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
    where = Where(positions, None if rows is None else list(rows), sae.config.skip_positions)

    with tracked_columns(model, prompt_length) as columns:

        def edited(activations: Tensor) -> Tensor | None:
            return edited_activations(activations, sae, chosen, where, columns, keep_error)

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
    return result if mask is None else torch.where(mask[..., None], result, activations)


def control_latents(
    density: Tensor, like: Sequence[int], count: int, *, seed: int = 0, exclude: Sequence[int] = ()
) -> list[list[int]]:
    """`count` random groups of latents to compare the group `like` with, each as large.

    Every latent is replaced by one of the twenty living ones that are active about as often.

    Args:
        density: Share of activations at which each latent is active, [d_sae].
        exclude: Latents that must not be drawn, beside those of `like`.

    Raises:
        ValueError: when there are too few living latents.
    """
    rng = random.Random(seed)
    banned = {*map(int, like), *map(int, exclude)}
    living = [latent for latent in (density > 0).nonzero()[:, 0].tolist() if latent not in banned]
    if len(living) < len(like):
        raise ValueError(f"{len(living)} other latents are alive, too few for controls of {len(like)}")
    level = density.double().clamp_min(1e-12).log()
    groups = []
    for _ in range(count):
        group: list[int] = []
        for latent in like:
            free = [other for other in living if other not in group]
            free.sort(key=lambda other: abs(float(level[other] - level[latent])))
            group.append(rng.choice(free[:20]))
        groups.append(group)
    return groups


def dose_response(
    model: nn.Module,
    module: str | nn.Module | None,
    sae: SparseAutoencoder,
    groups: dict[str, Sequence[int]],
    measure: Callable[[], float],
    doses: Sequence[float],
    *,
    mode: str = "scale",
    controls: int = 10,
    density: Tensor,
    seed: int = 0,
    **settings: Any,
) -> dict[str, Any]:
    """What `measure()` says under rising doses of an edit, for groups of latents and for random ones beside them.

    Args:
        groups: Latents by name.
        measure: Runs the model and says how far it did what is studied.
        doses: Values of the edit.
        mode: `"scale"`, `"clamp"` or `"add"`.
        controls: Random groups for each group, at least 1 (see `control_latents`).
        density: Share of activations at which each latent is active, [d_sae].
        settings: Further arguments of `intervene`.

    Returns:
        `{"doses", "mode", "base", "groups": {name: {"latents", "values", "controls"}}}`: `values` per dose, `controls`
        for every random group per dose.
    """
    if controls < 1:
        raise ValueError(f"controls={controls} was given, but a response says nothing without a random control")

    def response(latents: Sequence[int]) -> list[float]:
        values = []
        for dose in doses:
            with intervene(model, module, sae, Edit(list(latents), mode, float(dose)), **settings):
                values.append(float(measure()))
        return values

    named = [latent for group in groups.values() for latent in group]
    found: dict[str, Any] = {"doses": list(doses), "mode": mode, "base": float(measure()), "groups": {}}
    for name, latents in groups.items():
        others = control_latents(density, latents, controls, seed=seed, exclude=named)
        found["groups"][name] = {
            "latents": [int(latent) for latent in latents],
            "values": response(latents),
            "controls": [response(group) for group in others],
        }
    return found
