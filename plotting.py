"""Plots of reports and of the documentation in one style; the same data gives the same file. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import IO

from matplotlib.axes import Axes
from matplotlib.figure import Figure


def new_axes(title: str, *, width: float, height: float) -> tuple[Figure, Axes]:
    """An empty plot with its title on the left and no lines above and to the right.

    Args:
        title: one line.
        width: inches.
        height: inches.
    """
    figure = Figure(figsize=(width, height))
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def label(axes: Axes, x: str, y: str = "") -> None:
    """Name both axes."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def save(figure: Figure, file: Path | IO[bytes], *, dpi: int) -> None:
    """Write a figure: PNG, or the format of a path's suffix."""
    figure.tight_layout()
    figure.savefig(file, dpi=dpi, bbox_inches="tight", metadata={"Software": None})
