"""Pictures of a calibration as PNG bytes: coverage, magnitudes, errors. Their ground is the page's."""

from __future__ import annotations

import io
from collections.abc import Mapping
from itertools import cycle
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator, FuncFormatter, Locator, LogLocator, MaxNLocator, NullFormatter

from ..plotting import label, new_axes, save

WIDTH = 9
"""Inches."""
DPI = 160
"""Sharp on screens that show a picture larger, or with more pixels, than it was made for."""
COLORS = ("#0b5394", "#b45309", "#2d7d46", "#8e3a80")
STYLES = ("-", "--", ":")
"""Lines differ in color first, then in style: twelve of them can be told apart."""
MOST_NUMBERED = 32
"""Cells of a map with more rows or columns are too small for their numbers."""
LABEL_GAP = 0.065
"""Least distance of two labels, as a share of the axis."""

Rows = np.ndarray[Any, Any]


def heat_map(values: Rows, *, title: str, x: str, y: str, labels: list[str], note: str) -> bytes:
    """A map [rows, columns] on a logarithmic scale, every cell with its number where there is room; zeros are red."""
    rows, columns = values.shape
    numbered = max(rows, columns) <= MOST_NUMBERED
    height = 0.3 * rows if numbered else min(0.16 * rows, WIDTH)
    figure, axes = new_axes(title, width=min(WIDTH, 3 + 0.5 * columns), height=1.4 + height)
    shown = np.ma.masked_equal(values, 0)
    colors = mpl.colormaps["viridis"].with_extremes(bad="#c0392b")
    low = max(1.0, float(shown.min())) if shown.count() else 1.0
    high = max(2 * low, float(values.max()))
    image = axes.imshow(shown, aspect="auto", cmap=colors, norm=LogNorm(low, high), interpolation="nearest")
    every = -(-columns // MOST_NUMBERED)
    axes.set_xticks(range(0, columns, every), labels[::every], fontsize=8)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if numbered:
        _write_numbers(axes, shown, image)
    label(axes, x, y)
    bar = figure.colorbar(image, ax=axes, label=note, ticks=_round_values(low, high), format=_PLAIN, pad=0.02)
    bar.minorticks_off()
    return _png(figure)


def lines(series: Mapping[str, Mapping[int, float]], *, title: str, x: str, y: str, log: bool = False) -> bytes:
    """A line per name through its values at whole numbers, its name where it ends."""
    figure, axes = new_axes(title, width=WIDTH, height=3.6)
    looks = cycle((color, style) for style in STYLES for color in COLORS)
    drawn = []
    for (name, points), (color, style) in zip(series.items(), looks, strict=False):
        x_y = list(points), list(points.values())
        drawn += axes.plot(*x_y, style, marker=".", linewidth=1.4, color=color, label=name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if log:
        _plain_log_scale(axes)
    label(axes, x, y)
    _name_ends(axes, drawn)
    return _png(figure)


_PLAIN = FuncFormatter(lambda value, _: f"{value:g}")


def _write_numbers(axes: Axes, shown: Any, image: Any) -> None:
    """The number in every cell, dark on light."""
    for (row, column), value in np.ndenumerate(shown.filled(0)):
        light = value > 0 and image.norm(value) > 0.6
        text = f"{value}" if value < 1000 else f"{value / 1000:.1f}k"
        axes.text(column, row, text, ha="center", va="center", fontsize=6.5, color="black" if light else "white")


def _round_values(low: float, high: float) -> Locator:
    """Ticks of a logarithmic axis: 1, 10, 100, or finer where it spans little."""
    if high / low < 10:
        return AutoLocator()
    return LogLocator(subs=(1.0,) if high / low > 1000 else (1.0, 2.0, 5.0))


def _plain_log_scale(axes: Axes) -> None:
    """A logarithmic axis with numbers as people write them, at round values."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(_round_values(*axes.get_ylim()))
    axes.yaxis.set_major_formatter(_PLAIN)
    axes.yaxis.set_minor_formatter(NullFormatter())


def _name_ends(axes: Axes, drawn: list[Any]) -> None:
    """Write each line's name right of its end, moved up where two would meet."""
    to_axes = axes.transData + axes.transAxes.inverted()
    axes.set_ylim(axes.get_ylim())  # the axis stays as it is, whatever is written
    ends = [(to_axes.transform((line.get_xdata()[-1], line.get_ydata()[-1])), line) for line in drawn]
    above = -np.inf
    for (x, y), line in sorted(ends, key=lambda end: end[0][1]):
        above = max(y, above + LABEL_GAP)
        leader = {"arrowstyle": "-", "alpha": 0.5, "shrinkA": 0, "relpos": (0, 0.5), "color": line.get_color(),
                  "linestyle": line.get_linestyle()}
        axes.annotate(line.get_label(), (x, y), (1.02, above), "axes fraction", "axes fraction", va="center",
                      fontsize=8, color=line.get_color(), arrowprops=leader)


def _png(figure: Figure) -> bytes:
    figure.patch.set_alpha(0)
    for axes in figure.axes:
        axes.patch.set_alpha(0)
    buffer = io.BytesIO()
    save(figure, buffer, dpi=DPI)
    return buffer.getvalue()
