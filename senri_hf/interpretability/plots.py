"""Figures, as PNG files (needs the extra `plots`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..files import whole


MUTED = "0.5"


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
    """Write a figure; its path."""
    path = Path(path)
    if path.suffix != ".png":
        raise ValueError(f"{path} was given, but figures are written as .png")
    with whole(path) as scratch:
        drawing.savefig(scratch, format="png", dpi=130)
    return path


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
        axes.axhline(value, linestyle="--", color=MUTED)
        axes.annotate(f"{name}: {value:.4g}", (0.99, value), xycoords=("axes fraction", "data"), ha="right",
                      va="bottom", xytext=(0, 2), textcoords="offset points")  # fmt: skip
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
    """Histograms of how often latents are active, by name; latents that never are stand in the legend."""
    drawing, ((axes,),) = figure()
    shares = {name: np.asarray(density, dtype=float) for name, density in densities.items()}
    least = min((values[values > 0].min() for values in shares.values() if (values > 0).any()), default=1e-2)
    bins = np.linspace(max(-6.0, np.floor(np.log10(least))), 0, 49)
    for index, (name, values) in enumerate(shares.items()):
        dead = int((values == 0).sum())
        style = {"histtype": "step", "linewidth": 2} if index else {"alpha": 0.6}
        active = np.log10(values[values > 0]).clip(bins[0])
        axes.hist(active, bins=bins, label=f"{name}: {dead} of {len(values)} never active", **style)
    axes.set(xlabel="log10 of the share of activations at which a latent is active", ylabel="latents")
    axes.margins(y=0.25)  # the legend stands above the bars
    axes.legend(loc="upper left")
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


def dose_responses(
    found: dict[str, Any],
    path: str | Path,
    *,
    y_label: str,
    x_label: str | None = None,
    usual: float | None = None,
    others: str | None = None,
) -> Path:
    """What `dose_response` found: a panel for every group of latents, with its random latents and directions.

    Every control is a thin line. The mean of each sort is a wide one, so that one shows below the other where both are
    the same. A group that has a `"base"` of its own is drawn with that.

    Args:
        others: The name of what groups have as `"others"` beside their `"values"`: what is not studied at the same
            doses.
        usual: The largest dose that takes no latent to where it never is; beyond it the panels are grey.
    """
    drawing, (row,) = figure(1, len(found["groups"]), width=4.2, height=3.4)
    for axes in row[1:]:
        axes.sharey(row[0])
    for axes, (name, group) in zip(row, found["groups"].items(), strict=True):
        for kind, label, style in (
            ("controls", "random latents", {"color": MUTED, "linewidth": 4, "alpha": 0.7}),
            ("directions", "random directions", {"color": "C0", "linewidth": 2, "linestyle": "--"}),
        ):
            for control in group[kind]:
                axes.plot(found["doses"], control, color=style["color"], linewidth=0.6, alpha=0.5)
            axes.plot(found["doses"], np.mean(group[kind], axis=0), label=f"{label}, mean", **style)
        axes.plot(found["doses"], group["values"], color="C3", marker="o", label=name)
        if others is not None:
            axes.plot(found["doses"], group["others"], color="C2", marker=".", label=others)
        if usual is not None and usual < max(found["doses"]):
            axes.axvspan(usual, max(found["doses"]), color="0.93", zorder=0, label="larger than it ever is")
        axes.axhline(group["base"] if "base" in group else found["base"], color="k", linewidth=0.6, linestyle=":")
        axes.set(xlabel=x_label or f"dose ({found['mode']})", ylabel=y_label if axes is row[0] else "")
        axes.legend(fontsize=8)
    return save(drawing, path)


def matrix(
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    path: str | Path,
    *,
    label: str,
    title: str = "",
    x_label: str = "",
    y_label: str = "",
    percent: bool = True,
) -> Path:
    """Numbers by row and column, as colours and in figures."""
    shown = np.asarray(values, dtype=float)
    drawing, ((axes,),) = figure(width=1.1 * len(columns) + 2.6, height=0.5 * len(rows) + 1.6)
    image = axes.imshow(shown, cmap="viridis", aspect="auto")
    axes.set_xticks(np.arange(len(columns)), columns)
    axes.set_yticks(np.arange(len(rows)), rows)
    middle = (np.nanmin(shown) + np.nanmax(shown)) / 2
    for row, line in enumerate(shown):
        for column, value in enumerate(line):
            text = f"{value:.0%}" if percent else f"{value:.2f}"
            axes.text(column, row, text, ha="center", va="center", color="w" if value < middle else "k", fontsize=9)
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    drawing.colorbar(image, ax=axes, label=label)
    return save(drawing, path)


def curves(lines: dict[str, Sequence[float]], path: str | Path, *, x_label: str, y_label: str) -> Path:
    """Values at 0, 1, 2, … by name; the first line is what the others are to be like, and is drawn wide."""
    drawing, ((axes,),) = figure()
    for index, (name, values) in enumerate(lines.items()):
        style = {"color": MUTED, "linewidth": 4} if index == 0 else {"linewidth": 1.4}
        axes.plot(range(len(values)), values, label=name, **style)
    axes.axhline(0, color="k", linewidth=0.5)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.legend()
    return save(drawing, path)
