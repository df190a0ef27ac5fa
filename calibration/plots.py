"""Pictures of a calibration as PNG bytes: coverage, magnitudes, errors."""

from __future__ import annotations

import io
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator

from ..plotting import label, new_axes, save

WIDTH = 9
"""Inches."""

Rows = np.ndarray[Any, Any]


def heat_map(values: Rows, *, title: str, x: str, y: str, labels: list[str], note: str) -> bytes:
    """A map [rows, columns] on a logarithmic scale; zeros are marked in red."""
    figure, axes = new_axes(title, width=WIDTH, height=1.6 + 0.16 * len(values))
    shown = np.ma.masked_equal(values, 0)
    colors = mpl.colormaps["viridis"].with_extremes(bad="#c0392b")
    image = axes.imshow(shown, aspect="auto", cmap=colors, norm=_log_norm(shown), interpolation="nearest")
    axes.set_yticks(range(len(labels))[:: max(1, len(labels) // 16)], labels[:: max(1, len(labels) // 16)])
    axes.xaxis.set_major_locator(columns := AutoLocator())
    columns.set_params(integer=True)
    label(axes, x, y)
    figure.colorbar(image, ax=axes, label=note)
    return _png(figure)


def lines(series: dict[str, list[float]], *, title: str, x: str, y: str, log: bool = False) -> bytes:
    """One line per name over 0, 1, 2, ..."""
    figure, axes = new_axes(title, width=WIDTH, height=3.2)
    for name, values in series.items():
        axes.plot(range(len(values)), values, marker=".", linewidth=1.2, label=name)
    if log:
        axes.set_yscale("log")
    label(axes, x, y)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    return _png(figure)


def _log_norm(values: Any) -> Any:
    return LogNorm(vmin=max(1, values.min()), vmax=max(2, values.max())) if values.count() else None


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    save(figure, buffer, dpi=100)
    return buffer.getvalue()
