"""Plots of the documentation, written where ``--plot`` says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import PercentFormatter

from herdgraph.plotting import label, new_axes, save

WIDTH, DPI = 7.5, 160
_COLORS = ("#3b6ea8", "#d1793a", "#5a9b5a", "#8a6bb1", "#999999", "#b5485a", "#4aa3a2", "#c9a227")


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


def dots(path: Path, title: str, x: str, y: str, series: Mapping[str, Sequence[tuple[float, float, str]]]) -> None:
    """Named points joined by lines, y on a logarithmic axis."""
    figure, axes = new_axes(title, width=WIDTH, height=4.2)
    for color, (name, points) in zip(_COLORS, series.items(), strict=False):
        places = sorted((at, value) for at, value, _ in points)
        axes.plot(*zip(*places, strict=True), color=color, label=name, marker="o")
        for at, value, text in points:
            axes.annotate(text, (at, value), xytext=(4, 4), textcoords="offset points", fontsize=7, color=color)
    axes.set_yscale("log")
    label(axes, x, y)
    axes.legend(frameon=False)
    save(figure, path, dpi=DPI)


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


def sweeps(path: Path, x: str, y: str, panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]) -> None:
    """Panels beside each other, each with lines over a logarithmic axis whose lowest points are marked."""
    figure = Figure(figsize=(1.2 * WIDTH, 3.6))
    for axes, (title, series) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
        for color, (name, points) in zip(_COLORS, series.items(), strict=False):
            axes.plot(*zip(*points, strict=True), color=color, label=name)
            axes.plot(*min(points, key=lambda point: point[1]), color=color, marker="o")
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xscale("log", base=2)
        axes.spines[["top", "right"]].set_visible(False)
        label(axes, x, y if axes.get_subplotspec().is_first_col() else "")
        axes.legend(frameon=False)
    save(figure, path, dpi=DPI)


def before_and_after(path: Path, title: str, x: str, y: str, unit: str, before: Any, after: Any) -> None:
    """Two matrices [rows, columns] of shares beside each other on one scale, and their difference on its own."""
    figure = Figure(figsize=(1.2 * WIDTH, 4.8), layout=ConstrainedLayoutEngine(w_pad=0.1))
    figure.suptitle(title, fontsize=11)
    panels = figure.subplots(1, 3, sharey=True)
    top, most = max(before.max(), after.max()), max(abs(after - before).max(), 1e-9)
    for axes, name, values in zip(panels, ("before", "after"), (before, after), strict=False):
        image = axes.imshow(values, aspect="auto", cmap="Blues", vmin=0, vmax=top)
        axes.set(title=name, xlabel=x, xticks=range(values.shape[1]))
    figure.colorbar(image, ax=panels[:2], label=unit, format=PercentFormatter(1, 0))
    change = panels[2].imshow(after - before, aspect="auto", cmap="RdBu", vmin=-most, vmax=most)
    panels[2].set(title="after - before", xlabel=x, xticks=range(before.shape[1]))
    figure.colorbar(change, ax=panels[2], label="difference", format=PercentFormatter(1))
    panels[0].set_ylabel(y)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
