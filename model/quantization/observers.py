"""Names of the observers, which choose the magnitude of an input that an FP8 scale maps to 448. Torch-free.

``calibration/observers.py`` holds what they do. A calibration stores the magnitudes by all of them.
"""

from __future__ import annotations

from typing import Literal, get_args

Observer = Literal["max", "percentile", "mse", "entropy"]
OBSERVERS: tuple[Observer, ...] = get_args(Observer)
