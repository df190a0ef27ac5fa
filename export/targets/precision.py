"""What each target can store. Torch-free: the targets, the planner and the help texts of commands read it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ...model.quantization.recipes import Caches


class Precision(NamedTuple):
    """The precisions of a target.

    Attributes:
        recipes: names of the recipes that it can build; the first unless another is asked for.
        caches: how it can store keys and values.
        token_scales: 8-bit keys and values have a scale per token, which needs no calibration.
    """

    recipes: tuple[str, ...]
    caches: tuple[Caches, ...] = ("float",)
    token_scales: bool = False


_TENSORRT = Precision(("bf16", "fp8"), ("float", "fp8"))

PRECISIONS = {
    "cpu": Precision(("fp32", "int8", "int4", "fp8"), ("float", "float16", "int8"), token_scales=True),
    "cpu-stock": Precision(("fp32", "int8", "int4", "fp8"), ("float", "int8")),
    "cuda": Precision(("bf16", "int8", "int4"), ("float", "int8", "fp8")),
    "tensorrt-rtx": _TENSORRT,
    "tensorrt": _TENSORRT,
    "canonical": Precision(("fp32",)),
}
"""By the name of the target."""


def one_of(names: Iterable[str]) -> str:
    """Alternatives for people: a, b or c."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def recipes_by_target() -> str:
    """Which recipes every target builds, for a help text; targets that build the same stand together."""
    return "; ".join(f"{one_of(recipes)} for {' and '.join(targets)}"
                     for recipes, targets in _grouped({name: each.recipes for name, each in PRECISIONS.items()}))


def caches_by_target() -> str:
    """Which targets store keys and values in 8 bits, for a help text."""
    eights = {name: tuple(kind for kind in each.caches if kind != "float") for name, each in PRECISIONS.items()}
    return ", ".join(f"{one_of(kinds)} for {' and '.join(targets)}" for kinds, targets in _grouped(eights) if kinds)


def _grouped(values: Mapping[str, tuple[str, ...]]) -> list[tuple[tuple[str, ...], list[str]]]:
    """Each distinct value with the targets that have it."""
    return [(value, [name for name in values if values[name] == value]) for value in dict.fromkeys(values.values())]
