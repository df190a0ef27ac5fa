"""E4M3 codes and two-level scales: the same numbers as ONNX Runtime's and ml_dtypes', exact where they say they are."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnxruntime import InferenceSession, SessionOptions

from herdgraph.export.weights.fp8 import ChannelRatios, Fp8Codes, GlobalScale, OutlierWeights
from herdgraph.model.quantization.e4m3 import E4M3_MAX, channel_scales, power_of_two, rounded_up, to_e4m3

CODES = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint8)
"""All codes but the two NaNs."""


def quantize_linear(x: np.ndarray) -> np.ndarray:
    """Codes by ONNX Runtime, uint8."""
    zero = helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], b"\0", raw=True)
    graph = helper.make_graph(
        [helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["q"]),
         helper.make_node("Cast", ["q"], ["y"], to=TensorProto.FLOAT)],
        "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None])],
        [helper.make_tensor("one", TensorProto.FLOAT, [], [1.0]), zero],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    options = SessionOptions()
    options.log_severity_level = 3
    session = InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x.astype(np.float32)})[0]


def interesting() -> np.ndarray:
    """Every E4M3 value, every midpoint and its neighbours in float32, subnormals, and the far beyond."""
    values = np.unique(CODES.view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    middles = (values[1:] + values[:-1]) / 2
    beside = [np.nextafter(middles, np.float32(side)) for side in (-np.inf, np.inf)]
    return np.concatenate([values, middles, *beside, [2**-10, 2**-11, 2**-10 * 1.001, 449, 464, 465, 1e6, 3e38]])


def test_rounding_agrees_with_onnx_runtime() -> None:
    """All values, ties, subnormals and saturation."""
    x = np.concatenate([interesting(), -interesting()]).astype(np.float32)
    np.testing.assert_array_equal(to_e4m3(torch.from_numpy(x)).float().numpy(), quantize_linear(x))


def test_all_codes_agree_with_ml_dtypes() -> None:
    exact = CODES.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(to_e4m3(torch.from_numpy(exact)).view(torch.uint8).numpy(), CODES)
    inside = interesting()[np.abs(interesting()) <= E4M3_MAX].astype(np.float32)
    np.testing.assert_array_equal(
        to_e4m3(torch.from_numpy(inside)).float().numpy(), inside.astype(ml_dtypes.float8_e4m3fn).astype(np.float32))


@given(st.lists(st.floats(2.0**-100, 2.0**100, width=32), min_size=1, max_size=20))
def test_rounding_up_gives_the_next_bfloat16(values: list[float]) -> None:
    x = torch.tensor(values)
    up = rounded_up(x)
    assert torch.equal(up, up.bfloat16().float())
    assert (up >= x).all()
    assert (up <= x * (1 + 2**-7)).all()


@given(st.floats(1e-20, 1e20))
def test_power_of_two_is_the_smallest_that_is_not_below(value: float) -> None:
    found = power_of_two(value)
    assert np.log2(found) == round(np.log2(found))
    assert found / 2 < value <= found


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 30), st.floats(-12, 12))
def test_codes_and_two_levels_give_the_weight_back(seed: int, inputs: int, outputs: int, octave: float) -> None:
    random = np.random.default_rng(seed)
    spread = 2.0 ** random.uniform(-8, 8, outputs)
    weight_KN = (random.normal(size=(inputs, outputs)) * spread * 2.0**octave).astype(np.float32)
    codes = Fp8Codes(ir.Tensor(weight_KN))
    values = codes.numpy().astype(np.float32)
    ratios, g = ChannelRatios(codes).numpy(), float(GlobalScale(codes).numpy())
    assert np.isfinite(values).all()
    assert (ratios > 0).all()
    assert (ratios <= 1).all()
    np.testing.assert_array_equal(ratios, ratios.astype(ml_dtypes.bfloat16).astype(np.float32))
    found = values * g * ratios
    amax = np.abs(weight_KN).max(0)
    # Half a step of E4M3 is a 16th of a normal value, and 2^-10 of the scale below.
    assert (np.abs(found - weight_KN) <= np.maximum(np.abs(weight_KN) / 16, amax / 448 * 1.01 * 2**-10) * 1.001).all()


def test_a_channel_of_zeros_neither_fails_nor_spoils_the_others() -> None:
    weight_KN = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
    weight_KN[:, 2] = 0
    codes = Fp8Codes(ir.Tensor(weight_KN))
    assert (codes.numpy().astype(np.float32)[:, 2] == 0).all()
    assert float(GlobalScale(codes).numpy()) < 0.02
    assert np.isfinite(ChannelRatios(codes).numpy()).all()
    nothing = Fp8Codes(ir.Tensor(np.zeros((4, 4), np.float32)))
    assert np.isfinite(ChannelRatios(nothing).numpy()).all()


def test_scales_of_experts() -> None:
    """Experts share the global scale and keep their own channels."""
    magnitudes = np.array([1, 10, 0.01])[:, None, None]
    weight_EKN = (np.random.default_rng(0).normal(size=(3, 8, 5)) * magnitudes).astype(np.float32)
    codes = Fp8Codes(ir.Tensor(weight_EKN))
    found = codes.numpy().astype(np.float32) * float(GlobalScale(codes).numpy()) * ChannelRatios(codes).numpy()
    assert ChannelRatios(codes).numpy().shape == (3, 1, 5)
    for expert in range(3):
        error = np.abs(found[expert] - weight_EKN[expert]).max() / np.abs(weight_EKN[expert]).max()
        assert error < 1 / 16
    multipliers_E = np.array([4, 1, 256], np.float32)
    divided = ChannelRatios(codes, multipliers_E).numpy()
    np.testing.assert_array_equal(divided * multipliers_E[:, None, None], ChannelRatios(codes).numpy())


@pytest.mark.parametrize("shape", [(24, 10), (3, 24, 10)])
def test_written_codes_are_the_ones_in_memory(tmp_path: Path, shape: tuple[int, ...]) -> None:
    weight = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    outliers = torch.tensor([2, 3, 20])
    codes, again = (Fp8Codes(ir.Tensor(weight), outliers_J=outliers) for _ in range(2))
    with (tmp_path / "codes").open("wb") as file:
        codes.write_to(file.fileno(), 7)
    found = np.frombuffer((tmp_path / "codes").read_bytes()[7:], np.uint8).reshape(shape)
    np.testing.assert_array_equal(found, again.numpy().view(np.uint8))
    np.testing.assert_array_equal(codes.scales(), again.scales())
    for _ in ("handed over", "read again"):
        np.testing.assert_array_equal(OutlierWeights(codes).numpy(), weight[..., outliers.numpy(), :])


def test_channel_scales_never_saturate() -> None:
    rows = torch.randn(50, 33) * torch.logspace(-20, 20, 50)[:, None]
    assert (rows / channel_scales(rows)[:, None]).abs().max() <= E4M3_MAX


@pytest.mark.parametrize("experts", [0, 3])
def test_hessians_take_error_away_from_the_product(experts: int) -> None:
    """Of correlated inputs, as real ones are; a width that no block divides; every expert by its own Hessian."""
    generator = torch.Generator().manual_seed(0)
    shape = (experts, 90, 20) if experts else (90, 20)
    weight = torch.randn(shape, generator=generator)
    x = torch.randn(max(experts, 1), 300, 6, generator=generator) @ torch.randn(6, 90, generator=generator)
    x += 0.1 * torch.randn(x.shape, generator=generator)
    outliers = torch.tensor([0, 50, 89])
    codes, plain = (Fp8Codes(ir.Tensor(weight.numpy(), name="w"), hessian_of, outliers) for hessian_of in (
        lambda expert: x[expert or 0].T @ x[expert or 0], lambda _: None))
    rest = weight.index_fill(-2, outliers, 0.0)
    errors = [(x @ (torch.from_numpy(_values(found)) - rest)).square().sum((-2, -1)) for found in (codes, plain)]
    assert (errors[0] < 0.5 * errors[1]).all()
    assert not _values(codes)[..., outliers.numpy(), :].any()
    assert (codes.scales() >= plain.scales()).all(), "nothing is clipped"
    assert (codes.scales() < 2.01 * plain.scales()).all()


def _values(codes: Fp8Codes) -> np.ndarray:
    found = codes.numpy().astype(np.float32) * float(GlobalScale(codes).numpy())
    ratios = ChannelRatios(codes).numpy()
    return found * (ratios if found.ndim == 3 else ratios[0])
