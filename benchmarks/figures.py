"""Plots of the documentation: one style, written where ``--plot`` says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_COLOURS = ("#3b6ea8", "#d1793a", "#5a9b5a", "#8a6bb1", "#999999")


def bars(path: Path, title: str, unit: str, rows: Mapping[str, float]) -> None:
    """Horizontal bars, the first on top."""
    figure, axes = _axes(title, height=1.1 + 0.32 * len(rows))
    found = axes.barh(list(rows), list(rows.values()), color=_COLOURS[0])
    axes.bar_label(found, fmt="%.2f", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(unit)
    _save(figure, path)


def curves(path: Path, title: str, x: str, y: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Lines over two linear axes."""
    figure, axes = _axes(title, height=3.6)
    for colour, (name, points) in zip(_COLOURS, series.items(), strict=False):
        axes.plot(*zip(*points, strict=True), color=colour, label=name)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend(frameon=False)
    _save(figure, path)


def lines(path: Path, title: str, x: str, y: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Lines over two logarithmic axes."""
    figure, axes = _axes(title, height=3.6)
    for colour, (name, points) in zip(_COLOURS, series.items(), strict=False):
        axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend(frameon=False)
    _save(figure, path)


def heat_maps(path: Path, title: str, x: str, y: str, maps: Mapping[str, Any]) -> None:
    """Matrices beside each other on one scale."""
    pyplot = _pyplot()
    figure, several = pyplot.subplots(1, len(maps), figsize=(7.5, 4.5), sharey=True, layout="constrained")
    top = max(float(values.max()) for values in maps.values())
    for axes, (name, values) in zip(several, maps.items(), strict=True):
        image = axes.imshow(values, aspect="auto", cmap="Blues", vmin=0, vmax=top)
        axes.set(title=name, xlabel=x, xticks=range(values.shape[1]))
    several[0].set_ylabel(y)
    figure.colorbar(image, ax=several, label=title)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _axes(title: str, *, height: float):
    figure, axes = _pyplot().subplots(figsize=(7.5, height))
    axes.set_title(title, loc="left", fontsize=10)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _save(figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
