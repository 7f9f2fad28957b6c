"""Figures, as PNG files (needs the extra `plots`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor


MUTED = "0.6"


def figure(rows: int = 1, columns: int = 1, width: float = 6.4, height: float = 4.0) -> tuple[Any, Any]:
    """A figure and its axes [rows, columns], drawn without a display.

    Raises:
        ImportError: when matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Figures need matplotlib: pip install 'senri_hf[plots]'") from error
    drawing = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(drawing)
    return drawing, drawing.subplots(rows, columns, squeeze=False)


def save(drawing: Any, path: str | Path) -> Path:
    """Write a figure, under another name first; its path."""
    path = Path(path)
    if path.suffix != ".png":
        raise ValueError(f"{path} was given, but figures are written as .png")
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.tmp")
    drawing.savefig(scratch, format="png", dpi=130)
    return scratch.replace(path)


def training_curves(
    curves: dict[str, Sequence[tuple[float, float]]],
    path: str | Path,
    *,
    y_label: str = "loss",
    lines: dict[str, float] | None = None,
    log: bool = False,
) -> Path:
    """Curves of (step, value) by name, and horizontal lines by name."""
    drawing, ((axes,),) = figure()
    for name, points in curves.items():
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, label=name)
    for name, value in (lines or {}).items():
        axes.axhline(value, linestyle="--", color=MUTED, label=f"{name} {value:.4g}")
    if log:
        axes.set_yscale("log")
    axes.set(xlabel="step", ylabel=y_label)
    axes.legend()
    return save(drawing, path)


def attention_maps(layers: Sequence[Tensor], labels: Sequence[str], path: str | Path, *, first: int = 0) -> Path:
    """Attention weights of a sequence: for every layer [heads, T, T], a row of panels with a panel per head.

    Args:
        labels: T symbols of the sequence.
        first: Index of the first of `layers` in its model, for the titles.
    """
    heads = layers[0].shape[0]
    drawing, panels = figure(len(layers), heads, width=2.6, height=2.6)
    for index, (layer, row) in enumerate(zip(layers, panels, strict=True)):
        for head, axes in enumerate(row):
            image = axes.imshow(layer[head].detach().float().numpy(), vmin=0, vmax=1, cmap="viridis")
            ticks = np.arange(len(labels))
            axes.set_xticks(ticks, labels)
            axes.set_yticks(ticks, labels)
            axes.set_title(f"layer {first + index}, head {head}", fontsize=9)
    panels[-1][0].set(xlabel="symbol attended to", ylabel="symbol that attends")
    drawing.colorbar(image, ax=panels, label="attention weight", shrink=0.6)
    return save(drawing, path)


def latent_density(densities: dict[str, Sequence[float]], path: str | Path) -> Path:
    """Histograms of how often latents are active, by name; latents that never are stand in the title."""
    drawing, ((axes,),) = figure()
    bins = np.linspace(-6, 0, 49)
    for name, density in densities.items():
        values = np.asarray(density, dtype=float)
        dead = int((values == 0).sum())
        axes.hist(
            np.log10(values[values > 0]).clip(bins[0]),
            bins=bins,
            alpha=0.6,
            label=f"{name}: {dead} of {len(values)} never active",
        )
    axes.set(xlabel="log10 of the share of activations at which a latent is active", ylabel="latents")
    axes.legend()
    return save(drawing, path)


def latents_over_cycle(latents: Tensor, labels: Sequence[str], path: str | Path) -> Path:
    """Latents [steps, d_sae] over a cycle: those that are ever active, in the order of the step where they are most."""
    values = latents.detach().float().cpu()
    living = (values > 0).any(0).nonzero()[:, 0]
    living = living[values[:, living].argmax(0).argsort(stable=True)]
    shown = values[:, living].T
    drawing, ((axes,),) = figure(height=max(3.0, 0.22 * len(living) + 1.2), width=8.0)
    image = axes.imshow(shown.numpy(), aspect="auto", cmap="magma")
    axes.set_xticks(np.arange(len(labels)), labels)
    axes.set_yticks(np.arange(len(living)), [str(int(index)) for index in living], fontsize=7)
    axes.set(xlabel="last symbol of the context, phase by phase", ylabel="latent")
    drawing.colorbar(image, ax=axes, label="activation")
    return save(drawing, path)


def sparsity_frontier(points: dict[str, Sequence[tuple[float, float]]], path: str | Path) -> Path:
    """L0 against explained variance: a line of (l0, explained variance) by name."""
    drawing, ((axes,),) = figure()
    for name, line in points.items():
        active, explained = zip(*sorted(line), strict=True)
        axes.plot(active, explained, marker="o", label=name)
    axes.set(xlabel="latents active per activation (L0)", ylabel="explained variance")
    axes.legend()
    return save(drawing, path)


def dose_responses(found: dict[str, Any], path: str | Path, *, y_label: str) -> Path:
    """What `dose_response` found: a panel for every group of latents, with its random controls."""
    drawing, (row,) = figure(1, len(found["groups"]), width=4.2, height=3.4)
    for axes, (name, group) in zip(row, found["groups"].items(), strict=True):
        for index, control in enumerate(group["controls"]):
            label = "random latents" if index == 0 else None
            axes.plot(found["doses"], control, color=MUTED, linewidth=0.8, label=label)
        axes.plot(found["doses"], group["values"], color="C3", marker="o", label=name)
        axes.axhline(found["base"], color="k", linewidth=0.6, linestyle=":")
        axes.set(xlabel=f"dose ({found['mode']})", ylabel=y_label)
        axes.legend(fontsize=8)
    return save(drawing, path)
