"""Mixture against numpy in float64, on every unit: experts held in part, odd sizes, alone and in company."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.native_packing import (
    FLOAT32,
    INT4,
    INT8,
    MIXTURE_FORMATS,
    Packed,
    gate_up,
    hadamard,
    pack,
    rms_norm,
    rounded,
    sigmoid,
)

NAMES = ["x", "gain", "router", "gate_up", "gate_up_scales", "down", "down_scales", "shared_gate_up",
         "shared_gate_up_scales", "shared_down", "shared_down_scales"]
EPSILON = 1e-5
Node = Callable[..., Any]


@dataclass(frozen=True)
class Layer:
    """A layer's sizes; weights follow from the seed."""

    format: int = INT8
    shared_format: int = INT8
    dims: int = 70
    width: int = 48
    shared_width: int = 40
    experts: int = 4
    """Of the model; those held here are ``held``."""
    held: tuple[int, int] = (0, 4)
    top_k: int = 1
    hadamard: int = 0
    shared_hadamard: int = 0
    residual: bool = True
    seed: int = 0

    def weights(self) -> tuple[np.ndarray, np.ndarray, list[list[Packed]], list[Packed]]:
        """Gain, router, [gate_up, down] of every expert that is held, and of the shared one."""
        random = np.random.default_rng(self.seed)
        gain = (1 + 0.1 * random.standard_normal(self.dims)).astype(np.float32)
        router = (2 * random.standard_normal((self.dims, max(self.experts, 1))) / self.dims**0.5).astype(np.float32)

        def block(number: int, width: int) -> list[Packed]:
            both = random.standard_normal((self.dims, 2 * width)) / self.dims**0.5
            down = random.standard_normal((width, self.dims)) / width**0.5
            return [pack(number, gate_up(both)), pack(number, down)]

        experts = [block(self.format, self.width) for _ in range(*self.held)] if self.experts else []
        return gain, router, experts, block(self.shared_format, self.shared_width) if self.shared_width else []

    def attributes(self) -> dict[str, Any]:
        return {"format": self.format, "shared_format": self.shared_format, "width": self.width, "epsilon": EPSILON,
                "shared_width": self.shared_width, "experts": self.held[1] - self.held[0] if self.experts else 0,
                "all_experts": self.experts, "first_expert": self.held[0], "top_k": self.top_k,
                "hadamard": self.hadamard, "shared_hadamard": self.shared_hadamard, "residual": int(self.residual)}

    def inputs(self) -> dict[str, np.ndarray | None]:
        gain, router, experts, shared = self.weights()
        found: dict[str, np.ndarray | None] = {"gain": gain}
        if self.experts:
            found["router"] = pack(FLOAT32, router).codes
        for i, name in enumerate(("gate_up", "down")):
            if self.experts:
                found[name] = np.stack([expert[i].codes for expert in experts])
                scales = [expert[i].scales for expert in experts]
                found[f"{name}_scales"] = None if self.format != INT8 else np.stack(scales)  # type: ignore[arg-type]
            if shared:
                found[f"shared_{name}"], found[f"shared_{name}_scales"] = shared[i].codes, shared[i].scales
        return found

    def meant(self, x: np.ndarray) -> np.ndarray:
        """What it should give for rows."""
        gain, router, experts, shared = self.weights()
        n = rms_norm(x.astype(float), gain, EPSILON)
        y = x.astype(float) * self.residual
        if shared:
            y += feed_forward(n, shared, self.shared_width, self.shared_format, self.shared_hadamard)
        logits = n @ router
        chosen = np.argsort(-logits, 1, kind="stable")[:, : self.top_k if self.experts else 0]
        for e, expert in enumerate(experts, self.held[0]):
            rows = np.flatnonzero((chosen == e).any(1))
            if not len(rows):
                continue
            scored = n[rows] * sigmoid(logits[rows, e : e + 1])
            y[rows] += feed_forward(scored, expert, self.width, self.format, self.hadamard)
        return y


def feed_forward(x: np.ndarray, block: list[Packed], width: int, number: int, rotation: int) -> np.ndarray:
    """down(rotated(silu(gate x) * up x)), with rows in the codes that the weights want."""
    see = (lambda rows: rows) if number == FLOAT32 else rounded
    halves = (see(x) @ block[0].weights).reshape(len(x), -1, 2, 16)
    gate, up = (halves[:, :, i].reshape(len(x), -1)[:, :width] for i in (0, 1))
    hidden = gate * sigmoid(gate) * up
    if rotation:
        hidden = (hidden.reshape(len(x), -1, rotation) @ hadamard(rotation)).reshape(len(x), width)
    return see(hidden) @ block[1].weights


def make(node: Node, layer: Layer, threads: int = 1) -> Any:
    return node("Mixture", layer.attributes(), layer.inputs(), NAMES, threads=threads)


def rows(layer: Layer, tokens: int) -> np.ndarray:
    return np.random.default_rng(layer.seed + 1000).standard_normal((tokens, layer.dims)).astype(np.float32)


def close(y: np.ndarray, want: np.ndarray) -> bool:
    """To float32's precision, but for codes on the edge of rounding: rare, and worth a step of one code."""
    errors = np.abs(y - want).max(-1) / max(np.abs(want).max(), 1e-30)
    return bool((errors < 1e-5).mean() >= 0.7 and errors.max() < 3e-2)


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    experts = draw(st.sampled_from((0, 1, 3, 8)))
    first = draw(st.integers(0, max(experts - 1, 0)))
    rotation, shared_rotation = draw(st.sampled_from((0, 0, 8, 32))), draw(st.sampled_from((0, 0, 16, 64)))
    widths = st.integers(1, 100)
    return Layer(
        format=draw(st.sampled_from(MIXTURE_FORMATS)), shared_format=draw(st.sampled_from(MIXTURE_FORMATS)),
        dims=draw(st.integers(2, 150)),
        width=rotation * draw(st.integers(1, 3)) or draw(widths),
        shared_width=0 if draw(st.integers(0, 3)) == 0 else shared_rotation * draw(st.integers(1, 2)) or draw(widths),
        experts=experts, held=(first, draw(st.integers(min(first + 1, experts), experts))),
        top_k=draw(st.integers(1, max(min(experts, 3), 1))), hadamard=rotation, shared_hadamard=shared_rotation,
        residual=draw(st.booleans()), seed=draw(st.integers(0, 9)))


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layer=layers(), tokens=st.sampled_from((1, 2, 3, 5, 9, 40, 130)), threads=st.sampled_from((1, 2)))
def test_any_layer(node: Node, layer: Layer, tokens: int, threads: int) -> None:
    """The same numbers as float64, and a row's bits do not depend on its company."""
    x = rows(layer, tokens)
    run = make(node, layer, threads)
    (y,) = run(x=x)
    assert close(y, layer.meant(x))
    for first, last in ((0, 1), (tokens // 2, tokens // 2 + 1), (tokens // 3, tokens)):
        assert np.array_equal(run(x=x[first:last])[0], y[first:last])


@pytest.mark.parametrize("number", MIXTURE_FORMATS)
def test_an_expert_range_that_nobody_chose(node: Node, number: int) -> None:
    """A rank without a shared expert gives nothing for tokens that go elsewhere."""
    layer = Layer(format=number, shared_width=0, experts=16, held=(15, 16), residual=False)
    x = np.concatenate([rows(replace(layer, seed=seed), 8) for seed in range(4)])
    want = layer.meant(x)
    (y,) = make(node, layer)(x=x)
    assert not want.any(1).all()
    assert close(y, want)
    unchosen = x[~want.any(1)]
    for count in (1, len(unchosen)):
        assert not make(node, layer)(x=unchosen[:count])[0].any()


@pytest.mark.parametrize("number", MIXTURE_FORMATS)
def test_parts_of_the_experts_sum_to_the_whole(node: Node, number: int) -> None:
    whole = Layer(format=number, experts=8, held=(0, 8), top_k=2, shared_width=0, residual=False)
    x = rows(whole, 12)
    inputs = whole.inputs()
    total = np.zeros_like(x)
    for first in (0, 3):
        last = 3 if first == 0 else 8
        part = {name: array[first:last] if array is not None and name not in ("gain", "router") else array
                for name, array in inputs.items()}
        attributes = whole.attributes() | {"first_expert": first, "experts": last - first}
        total += node("Mixture", attributes, part, NAMES)(x=x)[0]
    assert np.allclose(total, make(node, whole)(x=x)[0], atol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("layer", [Layer(FLOAT32, FLOAT32), Layer(INT8, INT8, top_k=2), Layer(INT4, FLOAT32),
                                   Layer(FLOAT32, INT4), Layer(experts=0), Layer(shared_width=0)], ids=str)
def test_a_row_that_is_not_finite_ends_so_and_alone(node: Node, layer: Layer, bad: float) -> None:
    x = rows(layer, 9)
    run = make(node, layer)
    (clean,) = run(x=x)
    x[4, 5] = bad
    (y,) = run(x=x)
    assert not np.isfinite(y[4]).any()
    others = np.arange(9) != 4
    assert np.array_equal(y[others], clean[others])


@pytest.mark.parametrize("number", MIXTURE_FORMATS)
def test_equal_logits_go_to_the_lower_number(node: Node, number: int) -> None:
    layer = Layer(format=number, experts=4, top_k=2, shared_width=0)
    inputs = layer.inputs() | {"router": pack(FLOAT32, np.zeros((layer.dims, 4))).codes}
    x = rows(layer, 3)
    _, _, experts, _ = layer.weights()
    n = rms_norm(x.astype(float), layer.weights()[0], EPSILON) / 2
    want = x + sum(feed_forward(n, expert, layer.width, number, 0) for expert in experts[:2])
    assert close(node("Mixture", layer.attributes(), inputs, NAMES)(x=x)[0], want)


@pytest.mark.parametrize("changed", [
    {"width": 49}, {"width": 0}, {"width": -16}, {"shared_width": 99}, {"shared_width": -1}, {"experts": 5},
    {"experts": -1}, {"all_experts": 3}, {"all_experts": 200}, {"first_expert": 1}, {"first_expert": -1}, {"top_k": 0},
    {"top_k": 5}, {"format": INT4}, {"format": 7}, {"shared_format": -1}, {"hadamard": 7}, {"hadamard": 64},
    {"hadamard": 12}, {"hadamard": -8}, {"shared_hadamard": 3}, {"shared_hadamard": 128},
], ids=str)  # fmt: skip
def test_wrong_attributes_are_refused(node: Node, changed: dict[str, int]) -> None:
    layer = Layer()
    run = node("Mixture", layer.attributes() | changed, layer.inputs(), NAMES)
    with pytest.raises(Exception, match="Mixture: "):
        run(x=rows(layer, 2))


@pytest.mark.parametrize("name", NAMES[1:])
@pytest.mark.parametrize("missing", [False, True])
def test_wrong_weights_are_refused(node: Node, name: str, missing: bool) -> None:
    layer = Layer()
    inputs = layer.inputs()
    array = inputs[name]
    assert array is not None
    inputs[name] = None if missing else array.reshape(-1)[:-1]
    with pytest.raises(Exception, match=r"Mixture: |required|gain|INVALID_GRAPH|Fail"):
        node("Mixture", layer.attributes(), inputs, NAMES)(x=rows(layer, 2))


@pytest.mark.parametrize("shape", [(2, 69), (2, 0), ()])
def test_wrong_inputs_are_refused(node: Node, shape: tuple[int, ...]) -> None:
    with pytest.raises(Exception, match="Mixture: "):
        make(node, Layer())(x=np.ones(shape, np.float32))


def test_no_rows(node: Node) -> None:
    assert make(node, Layer())(x=np.ones((0, 70), np.float32))[0].shape == (0, 70)
