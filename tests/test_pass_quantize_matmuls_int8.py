"""QuantizeMatMulsInt8: codes and scales by their definition, the operator's numbers, what is left alone."""

from __future__ import annotations

from pathlib import Path

import graphs
import herds
import numpy as np
import onnx_ir as ir
import pytest
import torch
from herdgraph.export import weights
from herdgraph.export.passes import QuantizeMatMulsInt8
from herdgraph.export.pipeline import build_bundle
from herdgraph.export.quantize import BLOCK, BlockCodes, block_codes, block_scales, in_blocks
from herdgraph.export.verify import fidelity
from herdgraph.export.weights import Weight, stream
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.presets import TINY
from herdgraph.runtimes import Engine
from hypothesis import given
from hypothesis import strategies as st


def _dequantised(weight_KN: np.ndarray) -> np.ndarray:
    """What the stored codes stand for, back in the layout of the weight."""
    blocks = in_blocks(weight_KN.T)
    scales = block_scales(blocks)
    values = (block_codes(blocks, scales).astype(np.float32) - 128) * scales[..., None]
    return values.reshape(len(values), -1)[:, : len(weight_KN)].T


@given(st.integers(1, 100), st.integers(1, 9), st.integers(0, 2**31), st.floats(-30, 30))
def test_codes_are_the_nearest(inputs: int, channels: int, seed: int, magnitude: float) -> None:
    """The error of a weight is at most half a step, the step a 127th of its block's largest magnitude."""
    weight = (np.random.default_rng(seed).normal(size=(inputs, channels)) * 2.0**magnitude).astype(np.float32)
    scales = np.repeat(block_scales(in_blocks(weight.T)), BLOCK, axis=1)[:, :inputs].T
    assert (np.abs(_dequantised(weight) - weight) <= scales * 0.5001).all()


def test_zeros_stay_zeros() -> None:
    assert (_dequantised(np.zeros((40, 3), np.float32)) == 0).all()


LINEAR = """
linear (float[T, {K}] x, float[{K}, {N}] w) => (float[T, {N}] y) {{ y = MatMul (x, w) }}
"""


@pytest.mark.parametrize(("inputs", "channels"), [(64, 48), (48, 64), (33, 5), (32, 1)])
def test_numbers(inputs: int, channels: int) -> None:
    random = np.random.default_rng(0)
    w = random.normal(size=(inputs, channels)).astype(np.float32)
    x = random.normal(size=(7, inputs)).astype(np.float32)
    model = graphs.parse(LINEAR.format(K=inputs, N=channels), w=w)
    assert QuantizeMatMulsInt8()(model).modified
    assert graphs.operators(model) == {"MatMulNBits": 1}
    assert set(model.graph.initializers) == {"w.codes", "w.scales"}
    found, exact = graphs.run(model, x=x)[0], x @ _dequantised(w)
    # What remains is the quantisation of x: half of a 127th of its block's largest magnitude in each term.
    assert np.abs(found - exact).max() <= np.abs(x).max() / 127 / 2 * np.abs(w).sum(0).max()
    assert np.sqrt(((found - exact) ** 2).mean()) < 0.01 * exact.std()


def test_routers_activations_and_constants_are_left_alone() -> None:
    w = np.ones((64, 4), np.float32)
    routing = graphs.parse("""
    routing (float[T, 64] x, float[64, 4] layers_0.feed_forward.router.weight.T) => (float[T, 4] y) {
        y = MatMul (x, layers_0.feed_forward.router.weight.T)
    }""".replace("layers_0.feed_forward.router.weight.T", "router"), router=w)
    assert not QuantizeMatMulsInt8()(routing).modified
    attention = graphs.parse("a (float[T, 64] x, float[64, T] k) => (float[T, T] y) { y = MatMul (x, k) }")
    assert not QuantizeMatMulsInt8()(attention).modified


class Source:
    def read(self, _name: str, index: int | slice | None = None) -> torch.Tensor:
        return VALUES if index is None else VALUES[index]


VALUES = torch.randn(37, 70, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


@pytest.mark.parametrize("turned", [True, False])
def test_streamed_codes_are_the_whole_ones(turned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "BLOCK_BYTES", 1000)
    weight = Weight(Source(), "w", (37, 70))
    codes = BlockCodes(weight.transposed() if turned else weight)
    model = graphs.parse("g (float[1] x) => (float[1] y) { y = Identity (x) }")
    value = ir.Value(name="c", shape=ir.Shape(codes.shape.numpy()), type=ir.TensorType(codes.dtype), const_value=codes)
    model.graph.register_initializer(value)
    stream(model, tmp_path, "data")
    rows = VALUES.float().numpy() if turned else VALUES.float().numpy().T
    blocks = in_blocks(rows)
    assert value.const_value is not None
    np.testing.assert_array_equal(value.const_value.numpy(), block_codes(blocks, block_scales(blocks)))
    np.testing.assert_array_equal(codes.scales(), block_scales(blocks))


def test_a_whole_model_stays_close(tmp_path: Path) -> None:
    model = herds.save(TINY, tmp_path / "checkpoint")
    with open_checkpoint(tmp_path / "checkpoint") as checkpoint:
        bundle = build_bundle(checkpoint, tmp_path / "bundle", recipe="int8")
    graph = ir.load(bundle.graph("decoder"))
    found = graphs.operators(graph)
    assert found["MatMul"] == 0
    assert found["MatMulNBits"] == 4 * 2 + 2 * 2 + 2 * 2 + 2 * 4 * 2 + 1, "qkv and o, dense, shared, routed, head"
    engine, ids = Engine.load(tmp_path / "bundle", threads=1), [*herds.tokens(6), *[500] * 4, *herds.tokens(40)]
    pixels = torch.randn(1, 3, 28, 28)
    report = fidelity(
        herds.logits(model, ids, pixels).numpy(),
        engine.prefill(engine.new_sequence(), ids, pixels.numpy(), all_positions=True),
    )
    # A random router decides narrowly: a token that goes to another expert is far off, the others are close.
    assert 0 < report.mean_kl < 2e-2
    assert report.mean_difference < 0.1 * report.logit_std
    assert report.top1_agreement > 0.85
