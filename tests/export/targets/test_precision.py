"""What targets can store: named recipes, and help texts that say all of them."""

from __future__ import annotations

from typing import get_args

import pytest

from herdgraph.export.targets.precision import PRECISIONS, caches_by_target, one_of, recipes_by_target
from herdgraph.export.targets.registry import TARGETS
from herdgraph.model.quantization.recipes import RECIPES, Caches


def test_precisions_are_those_of_known_targets_and_recipes() -> None:
    assert PRECISIONS.keys() == TARGETS.keys()
    assert {name for each in PRECISIONS.values() for name in each.recipes} == set(RECIPES)
    assert {kind for each in PRECISIONS.values() for kind in each.caches} == set(get_args(Caches))


def test_help_texts_group_targets() -> None:
    assert recipes_by_target() == ("fp32, int8, int4 or fp8 for cpu and cpu-stock; "
                                   "bf16, int8 or int4 for cuda; bf16 or fp8 for tensorrt-rtx and tensorrt; "
                                   "fp32 for canonical")
    assert caches_by_target() == ("float16 or int8 for cpu, int8 for cpu-stock, int8 or fp8 for cuda, "
                                  "fp8 for tensorrt-rtx and tensorrt")


@pytest.mark.parametrize(("names", "text"), [("a", "a"), ("ab", "a or b"), ("abc", "a, b or c")])
def test_alternatives(names: str, text: str) -> None:
    assert one_of(names) == text
