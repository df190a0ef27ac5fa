"""Formulas and layouts of the GPU checks hold for the CPU's operators, in float32: on a GPU only the device is new."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from gpu_check import operators
from gpu_check.check import Place, Report


class Recorded(Report):
    """Keeps relative errors in the place of writing them down."""

    def __init__(self) -> None:
        self.errors: dict[str, tuple[float, float]] = {}

    def error(self, name: str, value: float, limit: float, *, real: bool = True) -> None:
        assert real
        self.errors[name] = value, limit


@pytest.mark.parametrize("name", ["MoE", "QMoE int4/32", "QMoE int8/channel", "GroupQueryAttention", "RotaryEmbedding",
                                  "SkipSimplifiedLayerNormalization", "MatMulNBits int4/32", "MatMulNBits int8/32"])
def test_operator(name: str) -> None:
    place = Place("cpu", Path(), time.monotonic() + 60)
    (check,) = (check for each, _, check in operators._cases(place) if each == f"{name} fp32")
    found = [(operators.error(value, wanted), limit) for value, wanted, limit in check(place, "fp32")]
    assert found
    assert all(value < 1e-6 < limit for value, limit in found), found


def test_nothing_is_begun_when_the_time_is_up() -> None:
    report, said = Recorded(), []
    report.skip = lambda name, why: said.append((name, why))  # type: ignore[method-assign]
    operators.run(Place("cpu", Path(), time.monotonic()), report)
    assert report.errors == {}
    assert len(said) == 8
