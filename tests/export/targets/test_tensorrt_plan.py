"""Plans read back: headers of all kinds, and products that came out otherwise than they were meant."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from herdgraph.errors import HerdError
from herdgraph.export.passes import ComputeIn
from herdgraph.export.targets.tensorrt import Plan, check_plan
from herdgraph.export.targets.tensorrt.builder import Profile, build_plan
from herdgraph.export.targets.tensorrt.fp8_products import refuse_wrong_patterns
from support import graphs

E, K, N = 4, 64, 48
PROFILE = Profile(name="decode", tokens=(1, 4, 16))
SM = ("89", "120")


def _product(*, experts: bool = False, axis: int | None = None, block: int = 0, dynamic: bool = False) -> ir.Model:
    """x · W in FP8, the weight's scales as asked."""
    random = np.random.default_rng(0)
    shape = (E, K, N) if experts else (K, N)
    scales = {None: (), 0: (shape[0],), 1: (shape[1],), 2: shape[2:]}[axis]
    if block:
        scales = tuple(size // block if index == axis else size for index, size in enumerate(shape))
    attributes = {None: ""}.get(axis, f"<axis = {axis}{f', block_size = {block}' if block else ''}>")
    dims = ", ".join(str(size) for size in ((E,) if experts else ()))
    model = graphs.parse(f"""
    product (float[{dims}{', ' if dims else ''}tokens, {K}] x, float{list(shape)} w, float{list(scales) or ''} g)
        => (float[{dims}{', ' if dims else ''}tokens, {N}] y) {{
        zero_int = Constant <value_int = 0> ()
        zero = Cast <to = 17> (zero_int)
        s = {'ReduceMax <keepdims = 0> (x)' if dynamic else 'Constant <value = float {0.05}> ()'}
        code = QuantizeLinear (x, s, zero)
        x8 = DequantizeLinear (code, s, zero)
        w8 = DequantizeLinear {attributes} (w, g)
        y = MatMul (x8, w8)
    }}""", w=random.normal(size=shape).astype(np.float32), g=random.uniform(0.5, 1, scales).astype(np.float32))
    for index, node in enumerate(model.graph):
        node.name = f"n{index}/{node.op_type}"
    codes = random.integers(0, 0x70, size=shape, dtype=np.uint8).view(ir.DataType.FLOAT8E4M3FN.numpy())
    weight = model.graph.initializers["w"]
    weight.const_value = ir.Tensor(codes, dtype=ir.DataType.FLOAT8E4M3FN, name="w")
    weight.type = ir.TensorType(ir.DataType.FLOAT8E4M3FN)
    model.functions.clear()
    cast = next(node for node in model.graph if node.op_type == "Cast")
    zero = ir.Tensor(np.zeros((), ir.DataType.FLOAT8E4M3FN.numpy()), dtype=ir.DataType.FLOAT8E4M3FN)
    constant = ir.node("Constant", [], {"value": zero}, name="zero")
    ir.convenience.replace_nodes_and_values(model.graph, cast, [cast], [constant], cast.outputs, constant.outputs)
    ComputeIn(ir.DataType.BFLOAT16)(model)
    return model


def _build(model: ir.Model, directory: Path) -> Plan:
    """A plan, whatever it holds."""
    pytest.importorskip("tensorrt_rtx")
    ir.save(model, directory / "m.onnx")
    return build_plan(directory / "m.onnx", directory / "p.plan", sm=SM, profiles=(PROFILE,), allow_fallback=True).plan


@pytest.mark.parametrize("experts", [False, True])
def test_scalar_scales_are_proved(experts: bool, tmp_path: Path) -> None:
    model = _product(experts=experts)
    check = check_plan(model, _build(model, tmp_path), SM)
    assert (check.fp8, check.intended) == (1, 1)
    assert str(check) == "1 of 1 FP8 products proved, 1 products in all"
    (row,) = check.rows
    assert (row.shape, row.found) == ((E, K, N) if experts else (K, N), "fp8 x fp8")


@pytest.mark.parametrize(("options", "message"), [
    ({"axis": 0, "block": 16}, "weight's scales are per block, TensorRT reads the first block's for all"),
    ({"experts": True, "axis": 1, "block": 64}, "weight's scales are per block"),
    ({"axis": 0}, "weight's scales are per input channel, TensorRT computes such a product in 16 bits"),
    ({"experts": True, "axis": 0}, "weight's scales are per expert"),
    ({"dynamic": True}, "input's scale is no constant"),
], ids=str)
def test_patterns_that_come_out_wrong_are_refused_by_name(options: dict[str, int], message: str) -> None:
    with pytest.raises(HerdError, match=f"n6/MatMul: the {message}.*; use one scalar constant scale"):
        refuse_wrong_patterns(_product(**options))


@pytest.mark.parametrize("options", [{"axis": 0}, {"experts": True, "axis": 0}, {"dynamic": True}], ids=str)
def test_what_fell_back_is_seen_in_the_plan(
    options: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("herdgraph.export.targets.tensorrt.builder.refuse_wrong_patterns", lambda _: None)
    model = _product(**options)
    plan = _build(model, tmp_path)
    with pytest.raises(HerdError, match=r"1 of 1 FP8 products .* not FP8, the first is n6/MatMul: .*bf16 x bf16"):
        check_plan(model, plan, SM)
    check = check_plan(model, plan, SM, allow_fallback=True)
    assert (check.fp8, len(check.fallbacks)) == (0, 1)


def test_a_fallback_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr("herdgraph.export.targets.tensorrt.builder.refuse_wrong_patterns", lambda _: None)
    ir.save(_product(axis=0), tmp_path / "m.onnx")
    with pytest.raises(HerdError, match="keep that part in floating point, or allow fallbacks"):
        build_plan(tmp_path / "m.onnx", tmp_path / "p.plan", sm=SM, profiles=(PROFILE,))
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_another_model_is_seen(tmp_path: Path) -> None:
    """Products are compared by name, and their scales by value."""
    model = _product()
    plan = _build(model, tmp_path)
    model.graph.initializers["g"].const_value = ir.tensor(np.float32(0.125), name="g")
    with pytest.raises(HerdError, match=r"its sums are scaled by 0\.0\d+ instead of 0.00625"):
        check_plan(model, plan, SM)
    next(node for node in model.graph if node.op_type == "MatMul").name = "another"
    with pytest.raises(HerdError, match="the first is another: no product of the plan names it"):
        check_plan(model, plan, SM)


def test_a_missing_gpu_is_seen(tmp_path: Path) -> None:
    model = _product()
    with pytest.raises(HerdError, match="it is not compiled for SM 121, only for 89, 120: build it again"):
        check_plan(model, _build(model, tmp_path), ("89", "121"))


def _patched(offset: int, value: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data[:offset] + value + data[offset + len(value) :]


@pytest.mark.parametrize(("change", "message"), [
    (lambda data: data[:-100], r"has \d+ bytes, its header says \d+: copy or build it again"),
    (lambda _: b"", "is empty, not a TensorRT-RTX plan"),
    (lambda _: b"ONNX" * 20, "is not a TensorRT-RTX plan: it begins with b'ONNX'"),
    (_patched(24, bytes([1, 8, 0, 2])), r"is a plan of TensorRT-RTX 1.8.0.2 .* this herdgraph reads 1.7.1.116"),
    (_patched(8, struct.pack("<Q", 3)), r"serialisation 3\), this herdgraph reads"),
    (lambda data: data[:16] + struct.pack("<Q", 64) + data[24:64], "holds no compiled graph"),
], ids=["cut", "empty", "another file", "another version", "another format", "no graph"])
def test_what_is_no_plan(change: Callable[[bytes], bytes], message: str, tmp_path: Path) -> None:
    _build(_product(), tmp_path)
    path = tmp_path / "p.plan"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(HerdError, match=message):
        Plan.read(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(HerdError, match="cannot be read: No such file"):
        Plan.read(tmp_path / "p.plan")
