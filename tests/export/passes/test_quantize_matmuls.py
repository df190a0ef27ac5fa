"""QuantizeMatMuls: codes and scales by their definition, the operator's numbers, what is left alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from herdgraph.export.passes import QuantizeMatMuls, RotateHidden
from herdgraph.export.pipeline import build_bundle
from herdgraph.export.verify import fidelity
from herdgraph.export.weights import stream as weights
from herdgraph.export.weights import writer
from herdgraph.export.weights.block import BlockCodes, BlockRounder, BlockScales, BlockZeros, filled_up, packed
from herdgraph.export.weights.channel import ChannelCodes, ChannelScales, channel_scales
from herdgraph.export.weights.stream import Weight
from herdgraph.export.weights.writer import stream
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.config.presets import TINY
from herdgraph.model.quantization.formats import BlockFormat, ChannelFormat
from herdgraph.model.quantization.recipes import RECIPES, Format, Recipe, Rule
from herdgraph.runtimes import Engine
from support import graphs, herds

FORMATS = [BlockFormat(8, 32), BlockFormat(8, 64), BlockFormat(8, 128), BlockFormat(4, 32), BlockFormat(4, 128)]


def _recipe(layout: Format) -> Recipe:
    return Recipe("test", "", (Rule("router", None), Rule("*", layout)))


def _dequantized(weight_KN: np.ndarray, layout: BlockFormat) -> np.ndarray:
    """What the stored codes stand for, back in the layout of the weight."""
    values = BlockRounder(layout).quantize(filled_up(np.ascontiguousarray(weight_KN.T), layout.block)).values()
    return values.reshape(len(values), -1)[:, : len(weight_KN)].T


@given(st.sampled_from(FORMATS), st.integers(1, 200), st.integers(1, 9), st.integers(0, 2**31), st.floats(-30, 30))
def test_error_of_a_weight(layout: BlockFormat, inputs: int, channels: int, seed: int, magnitude: float) -> None:
    """8 bits: half a step of the block's largest magnitude. 4 bits: as a block, never worse than plain rounding."""
    weight = (np.random.default_rng(seed).normal(size=(inputs, channels)) * 2.0**magnitude).astype(np.float32)
    rows = filled_up(np.ascontiguousarray(weight.T), layout.block)
    blocks, found = rows.reshape(channels, -1, layout.block), BlockRounder(layout).quantize(rows)
    errors = np.abs(found.values() - blocks)
    if layout.bits == 8:
        assert (errors <= np.abs(blocks).max(axis=-1, keepdims=True) / 127 * 0.5001).all()
        return
    low, high = np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)
    step = np.where(high > low, (high - low) / 15, 1)[..., None]
    zero = np.clip(np.rint(-low[..., None] / step), 0, 15)
    plain = (np.clip(np.rint(blocks / step) + zero, 0, 15) - zero) * step
    assert ((errors**2).sum(-1) <= ((plain - blocks) ** 2).sum(-1) * 1.001 + 1e-30).all()


@pytest.mark.parametrize("layout", FORMATS, ids=str)
def test_zeros_stay_zeros(layout: BlockFormat) -> None:
    assert (_dequantized(np.zeros((40, 3), np.float32), layout) == 0).all()


LINEAR = """
linear (float[T, {K}] x, float[{K}, {N}] w) => (float[T, {N}] y) {{ y = MatMul (x, w) }}
"""


@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize(("inputs", "channels"), [(256, 48), (48, 64), (33, 5), (32, 1), (160, 7)])
def test_numbers(inputs: int, channels: int, layout: BlockFormat) -> None:
    random = np.random.default_rng(0)
    w = random.normal(size=(inputs, channels)).astype(np.float32)
    x = random.normal(size=(7, inputs)).astype(np.float32)
    model = graphs.parse(LINEAR.format(K=inputs, N=channels), w=w)
    assert QuantizeMatMuls(_recipe(layout))(model).modified
    assert graphs.operators(model) == {"MatMulNBits": 1}
    assert set(model.graph.initializers) == {"w.codes", "w.scales", *(["w.zeros"] if layout.bits == 4 else [])}
    found, exact = graphs.run(model, x=x)[0], x @ _dequantized(w, layout)
    # What remains is the quantisation of x: half of a 127th of its block's largest magnitude in each term.
    assert np.abs(found - exact).max() <= np.abs(x).max() / 127 / 2 * np.abs(w).sum(0).max()
    assert np.sqrt(((found - exact) ** 2).mean()) < 0.015 * exact.std()


@pytest.mark.parametrize(("inputs", "channels"), [(256, 48), (33, 5), (32, 1), (160, 7)])
def test_numbers_of_channels(inputs: int, channels: int) -> None:
    random = np.random.default_rng(0)
    w = random.normal(size=(inputs, channels)).astype(np.float32)
    x = (random.normal(size=(7, inputs)) * 10.0 ** np.arange(-3, 4)[:, None]).astype(np.float32)
    x[3] = 0
    model = graphs.parse(LINEAR.format(K=inputs, N=channels), w=w)
    assert QuantizeMatMuls(_recipe(ChannelFormat()))(model).modified
    scales = channel_scales(np.ascontiguousarray(w.T))
    found, exact = graphs.run(model, x=x)[0], x @ (np.rint(w / scales) * scales)
    # Every row has a step of its own: half of a 127th of its largest magnitude in each term.
    bound = np.abs(x).max(1) / 127 / 2 * np.abs(w).sum(0).max() * 1.01
    assert (np.abs(found - exact).max(1) <= bound).all()
    assert (found[3] == 0).all()


def test_a_token_does_not_depend_on_its_company() -> None:
    random = np.random.default_rng(0)
    model = graphs.parse(LINEAR.format(K=64, N=48), w=random.normal(size=(64, 48)).astype(np.float32))
    QuantizeMatMuls(_recipe(ChannelFormat()))(model)
    x = random.normal(size=(9, 64)).astype(np.float32)
    alone = graphs.run(model, x=x[4:5])[0]
    x[0] *= 1e6
    np.testing.assert_array_equal(graphs.run(model, x=x)[0][4:5], alone)


def test_products_of_one_input_quantise_it_once() -> None:
    w = np.ones((64, 4), np.float32)
    model = graphs.parse("""
    g (float[T, 64] x, float[64, 4] w, float[64, 4] v) => (float[T, 4] y, float[T, 4] z) {
        y = MatMul (x, w)
        z = MatMul (x, v)
    }""", w=w, v=w)
    QuantizeMatMuls(_recipe(ChannelFormat()))(model)
    assert graphs.operators(model)["QuantizeLinear"] == 1
    assert graphs.operators(model)["MatMulIntegerToFloat"] == 2


@pytest.mark.parametrize("shape", ["T, 96", "B, T, 96"])
def test_hidden_rotation_keeps_the_product(shape: str) -> None:
    random = np.random.default_rng(0)
    w = random.normal(size=(96, 5)).astype(np.float32)
    text = f"g (float[{shape}] x, float[96, 5] layer.down_proj) => (float[{shape[:-2]}5] y) {{ y = MatMul (x, W) }}"
    model = graphs.parse(text.replace("layer.down_proj", "down_proj").replace("W)", "down_proj)"), down_proj=w)
    x = random.normal(size=(3, 96) if shape[0] == "T" else (2, 3, 96)).astype(np.float32)
    assert RotateHidden()(model).modified
    assert not np.allclose(model.graph.initializers["down_proj"].const_value.numpy(), w)
    np.testing.assert_allclose(graphs.run(model, x=x)[0], x @ w, atol=1e-4)


def test_routers_activations_and_constants_are_left_alone() -> None:
    w = np.ones((64, 4), np.float32)
    routing = graphs.parse("r (float[T, 64] x, float[64, 4] router) => (float[T, 4] y) { y = MatMul (x, router) }",
                           router=w)
    assert not QuantizeMatMuls(RECIPES["int8"])(routing).modified
    attention = graphs.parse("a (float[T, 64] x, float[64, T] k) => (float[T, T] y) { y = MatMul (x, k) }")
    assert not QuantizeMatMuls(RECIPES["int8"])(attention).modified


def test_rules_name_the_parts_of_a_model() -> None:
    int4, int8 = RECIPES["int4"], RECIPES["int8"]
    experts = "layers.1.feed_forward.experts.down_proj"
    assert int4.layout_of(experts) == BlockFormat(4, 32)
    assert int8.layout_of(experts) == ChannelFormat()
    joined = "layers.1.self_attn.q_proj.weight", "layers.1.self_attn.k_proj.weight"
    assert int4.layout_of(*joined) == ChannelFormat()
    assert int4.with_high_precision(["layers.1.self_attn"]).layout_of(*joined) is None
    assert int4.layout_of("lm_head.weight") == ChannelFormat()
    assert int8.layout_of("vision_model.model.layers.0.mlp.fc1.weight") == BlockFormat(8, 64)
    assert int4.layout_of("layers.1.feed_forward.router.weight") is None
    assert BlockFormat(4, 32).stored_bytes(1024, 8) == 0.640625 * 1024 * 8
    assert BlockFormat(8, 32).stored_bytes(1024, 8) == 1.125 * 1024 * 8


class Source:
    def read(self, _name: str, index: int | slice | None = None) -> torch.Tensor:
        return VALUES if index is None else VALUES[index]


VALUES = torch.randn(37, 70, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("turned", [True, False])
def test_streamed_codes_are_the_whole_ones(
    turned: bool, layout: BlockFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(writer, "INLINE_BYTES", 0)
    weight = Weight(Source(), "w", (37, 70))
    codes = BlockCodes(weight.transposed() if turned else weight, layout)
    model = graphs.parse("g (float[1] x) => (float[1] y) { y = Identity (x) }")
    tensors = {"codes": codes, "scales": BlockScales(codes), "zeros": BlockZeros(codes)}
    for name, tensor in tensors.items():
        value = ir.Value(name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype),
                         const_value=tensor)
        model.graph.register_initializer(value)
    stream(model, tmp_path, "data")
    written = {name: model.graph.initializers[name].const_value for name in tensors}
    rows = VALUES.float().numpy() if turned else VALUES.float().numpy().T
    expected = BlockRounder(layout).quantize(filled_up(np.ascontiguousarray(rows), layout.block))
    stored = expected.codes if layout.bits == 8 else packed(expected.codes)
    for name, array in (("codes", stored), ("scales", expected.scales), ("zeros", packed(expected.zeros))):
        np.testing.assert_array_equal(written[name].numpy(), array)
        np.testing.assert_array_equal(tensors[name].numpy(), array)


@pytest.mark.parametrize("turned", [True, False])
def test_streamed_channels_are_the_whole_ones(turned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(writer, "INLINE_BYTES", 0)
    weight = Weight(Source(), "w", (37, 70))
    codes = ChannelCodes(weight.transposed() if turned else weight)
    model = graphs.parse("g (float[1] x) => (float[1] y) { y = Identity (x) }")
    for name, tensor in {"codes": codes, "scales": ChannelScales(codes)}.items():
        model.graph.register_initializer(ir.Value(name=name, shape=ir.Shape(tensor.shape.numpy()),
                                                  type=ir.TensorType(tensor.dtype), const_value=tensor))
    stream(model, tmp_path, "data")
    rows = VALUES.float().numpy() if turned else VALUES.float().numpy().T
    scales = channel_scales(rows)
    np.testing.assert_array_equal(model.graph.initializers["scales"].const_value.numpy(), scales)
    np.testing.assert_array_equal(model.graph.initializers["codes"].const_value.numpy(), np.rint(rows.T / scales) + 128)


@pytest.mark.parametrize(("recipe", "bound"), [("int8", 2e-2), ("int4", 0.2)])
def test_a_whole_model_stays_close(recipe: str, bound: float, tmp_path: Path) -> None:
    model = herds.save(TINY, tmp_path / "checkpoint")
    with open_checkpoint(tmp_path / "checkpoint") as checkpoint:
        bundle = build_bundle(checkpoint, tmp_path / "bundle", target="cpu-stock", recipe=recipe)
    graph = ir.load(bundle.graph("decoder"))
    found = graphs.operators(graph)
    feed_forwards = 2 * 2 + 2 * 2 + 2 * 4 * 2  # dense, shared, routed
    blocks = feed_forwards if recipe == "int4" else 0
    assert found["MatMulNBits"] == blocks
    assert found["MatMulIntegerToFloat"] == 4 * 2 + 1 + feed_forwards - blocks, "qkv and o, head, and the rest"
    assert found["MatMul"] == 2 + feed_forwards // 2, "routers and the rotations of hidden values"
    engine, ids = Engine.load(tmp_path / "bundle", threads=1), [*herds.tokens(6), *[500] * 4, *herds.tokens(40)]
    pixels = torch.randn(1, 3, 28, 28)
    report = fidelity(
        herds.logits(model, ids, pixels).numpy(),
        engine.prefill(engine.new_sequence(), ids, pixels.numpy(), all_positions=True),
    )
    # A random router decides narrowly: a token that goes to another expert is far off, the others are close.
    assert 0 < report.mean_kl < bound
    if recipe == "int8":
        assert report.mean_difference < 0.1 * report.logit_std
        assert report.top1_agreement > 0.85
