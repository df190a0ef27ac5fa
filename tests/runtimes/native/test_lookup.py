"""Lookup against numpy on every unit: rows of packed matrices in every format, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from support.native_packing import FORMATS, INT8, pack

Node = Callable[..., Any]


def make(node: Node, number: int, w_KN: np.ndarray, **changed: Any) -> Any:
    """The operator with a table of N rows of K numbers."""
    packed = pack(number, w_KN)
    attributes = {"format": number, "channels": w_KN.shape[1], "width": w_KN.shape[0]}
    weights = {"codes": packed.codes, "scales": packed.scales}
    attributes |= {key: value for key, value in changed.items() if key in attributes}
    weights |= {key: value for key, value in changed.items() if key in weights}
    return node("Lookup", attributes, weights, ["ids", "codes", "scales"])


@pytest.mark.parametrize("number", FORMATS)
@pytest.mark.parametrize(("width", "rows"), [(64, 32), (70, 33), (1, 1), (200, 100)])
def test_rows_are_what_a_product_multiplies_with(node: Node, number: int, width: int, rows: int) -> None:
    w_KN = np.random.default_rng(number).standard_normal((width, rows))
    ids = np.array([[0, rows - 1, rows // 2], [rows // 3, 0, rows - 1]])
    (y,) = make(node, number, w_KN)(ids=ids)
    assert y.shape == (2, 3, width)
    np.testing.assert_allclose(y, pack(number, w_KN).weights.T[ids], rtol=1e-6)


def test_no_ids_and_one(node: Node) -> None:
    run = make(node, INT8, np.ones((70, 33)))
    assert run(ids=np.zeros((0, 2), np.int64))[0].shape == (0, 2, 70)
    assert run(ids=np.array(32))[0].shape == (70,)


@pytest.mark.parametrize("changed", [
    {"channels": 0}, {"channels": 65}, {"format": 7}, {"format": -1}, {"width": 0}, {"width": 65}, {"scales": None},
    {"scales": np.ones(63, np.float32)}, {"codes": np.zeros(99, np.uint8)},
])  # fmt: skip
def test_wrong_sizes_are_refused(node: Node, changed: dict[str, Any]) -> None:
    with pytest.raises(Exception, match="Lookup: "):
        make(node, INT8, np.ones((64, 64)), **changed)(ids=np.array([1]))


@pytest.mark.parametrize("number", [-1, 33, 2**40])
def test_ids_outside_are_refused(node: Node, number: int) -> None:
    """Rows that only fill up the last tile are none."""
    with pytest.raises(Exception, match="Lookup: an id is none"):
        make(node, INT8, np.ones((64, 33)))(ids=np.array([0, number]))
