"""Kinds of training runs, as functions: each takes its options and returns what it measured."""

from __future__ import annotations

from .align import AlignOptions, align
from .codistil import CodistilOptions, codistil
from .distil import DistilOptions, distil
from .long_context import LongContextOptions, long_context
from .pretrain import PretrainOptions, pretrain
from .upcycle_then_distil import UpcycleOptions, upcycle_then_distil

TRAINING_RUNS = {
    "align": (align, AlignOptions),
    "pretrain": (pretrain, PretrainOptions),
    "distil": (distil, DistilOptions),
    "codistil": (codistil, CodistilOptions),
    "upcycle_then_distil": (upcycle_then_distil, UpcycleOptions),
    "long_context": (long_context, LongContextOptions),
}
"""Function and options by name."""

__all__ = [
    "TRAINING_RUNS", "AlignOptions", "CodistilOptions", "DistilOptions", "LongContextOptions", "PretrainOptions",
    "UpcycleOptions", "align", "codistil", "distil", "long_context", "pretrain", "upcycle_then_distil",
]
