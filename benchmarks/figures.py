"""Plots of the documentation: one style, written where ``--plot`` says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

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


def _axes(title: str, *, height: float):
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, height))
    axes.set_title(title, loc="left", fontsize=10)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _save(figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
