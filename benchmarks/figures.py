"""Plots of the documentation, written where ``--plot`` says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from herdgraph.plotting import label, new_axes, save

WIDTH, DPI = 7.5, 110
_COLORS = ("#3b6ea8", "#d1793a", "#5a9b5a", "#8a6bb1", "#999999")


def bars(path: Path, title: str, unit: str, rows: Mapping[str, float]) -> None:
    """Horizontal bars, the first on top."""
    figure, axes = new_axes(title, width=WIDTH, height=1.1 + 0.32 * len(rows))
    found = axes.barh(list(rows), list(rows.values()), color=_COLORS[0])
    axes.bar_label(found, fmt="%.2f", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    label(axes, unit)
    save(figure, path, dpi=DPI)


def curves(path: Path, title: str, x: str, y: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Lines over two linear axes."""
    _lines(path, title, x, y, series)


def lines(path: Path, title: str, x: str, y: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Lines over two logarithmic axes, every point marked."""
    _lines(path, title, x, y, series, log=True)


def _lines(
    path: Path, title: str, x: str, y: str, series: Mapping[str, Sequence[tuple[float, float]]], *, log: bool = False
) -> None:
    figure, axes = new_axes(title, width=WIDTH, height=3.6)
    for color, (name, points) in zip(_COLORS, series.items(), strict=False):
        axes.plot(*zip(*points, strict=True), color=color, label=name, marker="o" if log else "")
    if log:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
    label(axes, x, y)
    axes.legend(frameon=False)
    save(figure, path, dpi=DPI)


def heat_maps(path: Path, title: str, x: str, y: str, maps: Mapping[str, Any]) -> None:
    """Matrices beside each other on one scale."""
    figure = Figure(figsize=(WIDTH, 4.5), layout="constrained")
    several = figure.subplots(1, len(maps), sharey=True)
    top = max(float(values.max()) for values in maps.values())
    for axes, (name, values) in zip(several, maps.items(), strict=True):
        image = axes.imshow(values, aspect="auto", cmap="Blues", vmin=0, vmax=top)
        axes.set(title=name, xlabel=x, xticks=range(values.shape[1]))
    several[0].set_ylabel(y)
    figure.colorbar(image, ax=several, label=title)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
