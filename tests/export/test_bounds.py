"""Bounds of fidelity: healthy bundles of the calf pass, broken ones do not (figures measured, see the module)."""

from __future__ import annotations

import math

import pytest

from herdgraph.export.bounds import BOUNDS
from herdgraph.export.verify import Fidelity

HEALTHY = {"fp32": (1.2e-5, 8e-13, 1.0), "int8": (2.66, 0.0036, 0.965), "int4": (4.58, 0.0277, 0.840),
           "fp8": (4.63, 0.0334, 0.924)}
BROKEN = {"fp32": (4.74, 0.105, 0.75), "int8": (4.74, 0.105, 0.75), "int4": (5.79, 0.141, 0.681),
          "fp8": (5.4, 0.146, 0.736)}
"""Largest difference, mean KL and top-1 of the worst healthy and of the best broken bundle, a tensor off by two."""


def report(difference: float, kl: float, top1: float, **others: float) -> dict[str, float]:
    values = {"tokens": 144, "max_difference": difference, "mean_difference": 0.1, "logit_std": 3.3, "mean_kl": kl,
              "top1_agreement": top1, "max_kl": 1.0, "decode_difference": 0.0, "decode_kl": 0.0}
    return Fidelity(**(values | others)).to_json()  # type: ignore[arg-type]


@pytest.mark.parametrize("recipe", HEALTHY)
def test_healthy_and_broken(recipe: str) -> None:
    assert list(BOUNDS[recipe].broken(report(*HEALTHY[recipe]))) == []
    assert list(BOUNDS[recipe].broken(report(*BROKEN[recipe])))


@pytest.mark.parametrize(("recipe", "others", "said"), [
    ("fp32", {"decode_difference": 0.5}, "largest logit difference is 0.5, the bound is 0.001"),
    ("int8", {"decode_kl": 0.5}, "decoding one by one differs by a KL of 0.5 nats, the bound is 0.02"),
    ("int8", {"mean_kl": math.nan}, "mean KL divergence is nan"),
    ("int4", {"top1_agreement": 0.5}, "50.0% of the top tokens are the same, the bound is 75.0%"),
])
def test_what_is_broken_is_said(recipe: str, others: dict[str, float], said: str) -> None:
    (line,) = BOUNDS[recipe].broken(report(*HEALTHY[recipe], **others))
    assert said in line


def test_every_recipe_has_bounds() -> None:
    from herdgraph.model.quantization.recipes import RECIPES

    assert BOUNDS.keys() == RECIPES.keys()
