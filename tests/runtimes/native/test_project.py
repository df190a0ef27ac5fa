"""Project against numpy in float64, on every unit: any sizes, alone and in company, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.native_packing import (
    FLOAT32,
    FORMATS,
    INT4,
    INT8,
    INT8_BLOCKS,
    layer_norm,
    pack,
    rms_norm,
    rounded,
    rounded_in_blocks,
)

NAMES = ["x", "codes", "scales", "gain", "residual", "shift", "bias"]
GELU = 1
EPSILON = 1e-5
Node = Callable[..., Any]
Array = np.ndarray | None


def make(node: Node, number: int, w_KN: np.ndarray, gain: Array = None, threads: int = 1, **changed: Any) -> Any:
    """The operator with a matrix."""
    packed = pack(number, w_KN)
    attributes = {"format": number, "channels": w_KN.shape[1], "epsilon": EPSILON, "activation": 0}
    weights = {"codes": packed.codes, "scales": packed.scales, "gain": gain, "shift": None, "bias": None}
    attributes |= {key: value for key, value in changed.items() if key in attributes}
    weights |= {key: value for key, value in changed.items() if key in weights}
    return node("Project", attributes, weights, NAMES, threads=threads)


def meant(number: int, w_KN: np.ndarray, x: np.ndarray, gain: Array, residual: Array) -> np.ndarray:
    """What it should give."""
    n = x.astype(float) if gain is None else rms_norm(x.astype(float), gain, EPSILON)
    y = product(number, w_KN, n)
    return y if residual is None else y + residual


def product(number: int, w_KN: np.ndarray, n: np.ndarray) -> np.ndarray:
    """W n with both in the format's codes."""
    codes = n if number == FLOAT32 else rounded_in_blocks(n) if number == INT8_BLOCKS else rounded(n)
    return codes @ pack(number, w_KN).weights


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(number=st.sampled_from(FORMATS), inputs=st.integers(1, 300), channels=st.integers(1, 100),
       tokens=st.integers(1, 200), with_gain=st.booleans(), with_residual=st.booleans(),
       threads=st.sampled_from((1, 2)), seed=st.integers(0, 99))
def test_any_sizes(node: Node, number: int, inputs: int, channels: int, tokens: int, with_gain: bool,
                   with_residual: bool, threads: int, seed: int) -> None:
    """The same numbers as float64 products of the same codes, and a row's bits do not depend on its company."""
    random = np.random.default_rng(seed)
    w = random.standard_normal((inputs, channels)) / inputs**0.5
    gain = (1 + 0.1 * random.standard_normal(inputs)).astype(np.float32) if with_gain else None
    feed = {"x": random.standard_normal((tokens, inputs)).astype(np.float32)}
    if with_residual:
        feed["residual"] = random.standard_normal((tokens, channels)).astype(np.float32)
    run = make(node, number, w, gain, threads)
    (y,) = run(**feed)
    assert close(y, meant(number, w, feed["x"], gain, feed.get("residual")), number)
    for first, last in ((0, 1), (tokens // 2, tokens // 2 + 1), (tokens // 3, tokens)):
        (part,) = run(**{name: array[first:last] for name, array in feed.items()})
        assert np.array_equal(part, y[first:last])


@pytest.mark.parametrize("number", FORMATS)
@pytest.mark.parametrize(("inputs", "channels"), [(70, 33), (64, 32)])
def test_a_layer_of_an_image_tower(node: Node, number: int, inputs: int, channels: int) -> None:
    """Layer norm, bias and GELU, with a residual behind them."""
    random = np.random.default_rng(4)
    w = random.standard_normal((inputs, channels)) / inputs**0.5
    gain, shift = (random.standard_normal(inputs).astype(np.float32) for _ in range(2))
    bias = random.standard_normal(channels).astype(np.float32)
    x = (3 + random.standard_normal((5, inputs))).astype(np.float32)
    residual = random.standard_normal((5, channels)).astype(np.float32)
    (y,) = make(node, number, w, gain, shift=shift, bias=bias, activation=GELU)(x=x, residual=residual)
    z = product(number, w, layer_norm(x.astype(float), gain, shift, EPSILON)) + bias
    assert close(y, gelu(z) + residual, number)


def test_gelu_is_exact_far_from_zero(node: Node) -> None:
    """Negative values keep their digits; what is not finite stays so."""
    x = np.float32([[-30, -9, -3, -0.5, -1e-6, 0, 1e-6, 0.5, 3, 30]])
    run = make(node, FLOAT32, np.eye(10), activation=GELU)
    np.testing.assert_allclose(run(x=x)[0], gelu(x.astype(float)), rtol=2e-5, atol=1e-37)
    for bad in (np.nan, np.inf, -np.inf):
        assert not np.isfinite(run(x=np.full((1, 10), bad, np.float32))[0]).any()


@pytest.mark.parametrize("number", FORMATS)
def test_many_rows_are_the_same_bits(node: Node, number: int) -> None:
    """From 1,024 rows on, groups of rows are made one after the other."""
    random = np.random.default_rng(5)
    run = make(node, number, random.standard_normal((70, 40)), np.ones(70, np.float32), threads=2)
    x = random.standard_normal((1100, 70)).astype(np.float32)
    (y,) = run(x=x)
    assert np.array_equal(y, np.concatenate([run(x=x[:500])[0], run(x=x[500:])[0]]))


def gelu(z: np.ndarray) -> np.ndarray:
    return np.array([value * math.erfc(-value / math.sqrt(2)) / 2 for value in z.ravel()]).reshape(z.shape)


def close(y: np.ndarray, want: np.ndarray, number: int) -> bool:
    """To float32's precision; a value on the edge between two codes may take the other one."""
    errors = np.abs(y - want) / np.abs(want).max()
    rows = errors.max(-1)
    return bool((rows < 3e-6).mean() >= (1 if number == FLOAT32 else 0.7) and rows.max() < 2e-2)


@pytest.mark.parametrize("number", FORMATS)
def test_a_long_row_is_exact(node: Node, number: int) -> None:
    """5,120 inputs of the largest codes: no sum of integers overflows, no rounding is on an edge."""
    x = np.full((3, 5120), 127, np.float32) * np.array([[1], [-1], [0.5]], np.float32)
    w = np.ones((5120, 40)) * np.where(np.arange(40) % 2, 1, -1)
    (y,) = make(node, number, w)(x=x)
    assert np.allclose(y, x.astype(float) @ pack(number, w).weights, rtol=2e-5)


@pytest.mark.parametrize("number", FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 69])
def test_a_row_that_is_not_finite_ends_so_and_alone(node: Node, number: int, bad: float, place: int) -> None:
    random = np.random.default_rng(1)
    w, x = random.standard_normal((70, 33)), random.standard_normal((9, 70)).astype(np.float32)
    run = make(node, number, w)
    (clean,) = run(x=x)
    x[4, place] = bad
    (y,) = run(x=x)
    assert not np.isfinite(y[4]).any()
    others = np.arange(9) != 4
    assert np.array_equal(y[others], clean[others])


@pytest.mark.parametrize("size", [0, 1e-40, 2e-37, 3e-36, 1e-30, 1e30])
@pytest.mark.parametrize("number", FORMATS)
def test_rows_of_any_size(node: Node, number: int, size: float) -> None:
    """Tiny rows give tiny results: zero, or the right ones."""
    random = np.random.default_rng(2)
    w, x = random.standard_normal((64, 32)), (random.standard_normal((5, 64)) * size).astype(np.float32)
    want = meant(number, w, x, None, None)
    (y,) = make(node, number, w)(x=x)
    assert np.allclose(y, want, rtol=1e-3, atol=max(np.abs(want).max() * 1e-2, 1e-34))


def test_leading_dimensions_and_no_rows(node: Node) -> None:
    random = np.random.default_rng(3)
    w, x = random.standard_normal((20, 7)), random.standard_normal((2, 3, 20)).astype(np.float32)
    run = make(node, INT8, w)
    (y,) = run(x=x)
    assert y.shape == (2, 3, 7)
    assert np.array_equal(y.reshape(6, 7), run(x=x.reshape(6, 20))[0])
    assert run(x=x[:0])[0].shape == (0, 3, 7)


@pytest.mark.parametrize(("changed", "number"), [
    ({"channels": 0}, INT8), ({"channels": -5}, INT8), ({"channels": 65}, INT8), ({"format": 7}, INT8),
    ({"format": -1}, INT8), ({"format": INT4}, INT8), ({"scales": None}, INT8),
    ({"scales": np.ones(63, np.float32)}, INT8),
    ({"activation": 2}, INT8), ({"shift": np.ones(100, np.float32)}, INT8), ({"bias": np.ones(63, np.float32)}, INT8),
    ({"gain": np.ones(100, np.float32), "shift": np.ones(99, np.float32)}, INT8), ({"format": INT8_BLOCKS}, INT8),
    ({"gain": np.ones(99, np.float32)}, INT8), ({"codes": np.zeros(99, np.uint8)}, FLOAT32),
])  # fmt: skip
def test_wrong_sizes_are_refused(node: Node, changed: dict[str, Any], number: int) -> None:
    run = make(node, number, np.ones((100, 64)), **changed)
    with pytest.raises(Exception, match="Project: "):
        run(x=np.ones((2, 100), np.float32))


@pytest.mark.parametrize("shapes", [
    {"x": (2, 99)}, {"x": (2, 0)}, {"x": ()}, {"x": (2, 100), "residual": (1, 64)},
    {"x": (2, 100), "residual": (2, 63)},
])  # fmt: skip
def test_wrong_inputs_are_refused(node: Node, shapes: dict[str, tuple[int, ...]]) -> None:
    run = make(node, INT8, np.ones((100, 64)), np.ones(100, np.float32))
    with pytest.raises(Exception, match="Project: "):
        run(**{name: np.ones(shape, np.float32) for name, shape in shapes.items()})
