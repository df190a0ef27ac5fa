"""Ways to train a model, as functions: each takes its options and returns what it measured."""

from __future__ import annotations

from .align import AlignOptions, align
from .distil import DistilOptions, distil
from .long_context import LongContextOptions, long_context
from .pretrain import PretrainOptions, pretrain
from .upcycle_then_distil import UpcycleOptions, upcycle_then_distil

RECIPES = {
    "align": (align, AlignOptions),
    "pretrain": (pretrain, PretrainOptions),
    "distil": (distil, DistilOptions),
    "upcycle_then_distil": (upcycle_then_distil, UpcycleOptions),
    "long_context": (long_context, LongContextOptions),
}
"""Function and options by the name on the command line."""

__all__ = [
    "RECIPES", "AlignOptions", "DistilOptions", "LongContextOptions", "PretrainOptions", "UpcycleOptions", "align",
    "distil", "long_context", "pretrain", "upcycle_then_distil",
]
