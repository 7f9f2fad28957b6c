"""What rising doses of an edit do, beside what random latents and random directions do."""

import random
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from .intervention import Edit, intervene
from .sparse_autoencoder import SparseAutoencoder


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
    unit: Tensor | None = None,
    controls: int = 10,
    density: Tensor,
    seed: int = 0,
    **settings: Any,
) -> dict[str, Any]:
    """What `measure()` says under rising doses of an edit, for groups of latents and for two controls beside them.

    Random latents show what any part of the representation would do at that dose; random directions, with changes as
    long as those of the group, what any disturbance of that size would do.

    Args:
        groups: Latents by name.
        measure: Runs the model and says how far it did what is studied.
        doses: Values of the edit.
        mode: `"scale"`, `"clamp"` or `"add"`.
        unit: What a dose of 1 is for each latent, [d_sae]; 1 for all when None. With every latent's largest activation,
            doses to 1 take no latent, of the group or random, to where it never is. (A latent that is never above 1 and
            set to 10 breaks what reads it, which says nothing of what it is for.)
        controls: Random groups, and random directions, for each group, at least 1 (see `control_latents`).
        density: Share of activations at which each latent is active, [d_sae].
        settings: Further arguments of `intervene`.

    Returns:
        `{"doses", "mode", "base", "groups": {name: {"latents", "values", "controls", "directions"}}}`: `values` per
        dose, `controls` and `directions` for every random group and direction per dose.
    """
    if controls < 1:
        raise ValueError(f"controls={controls} was given, but a response says nothing without a random control")
    if unit is not None and unit.shape != (sae.W_dec.shape[0],):
        raise ValueError(f"unit {list(unit.shape)} was given, but there are {sae.W_dec.shape[0]} latents")

    def response(latents: Sequence[int], direction_seed: int | None = None) -> list[float]:
        values = []
        indices = list(latents)
        for dose in doses:
            value = float(dose) if unit is None else float(dose) * unit[indices]
            edit = Edit(indices, mode, value)
            with intervene(model, module, sae, edit, direction_seed=direction_seed, **settings):
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
            "directions": [response(latents, seed + index) for index in range(controls)],
        }
    return found
