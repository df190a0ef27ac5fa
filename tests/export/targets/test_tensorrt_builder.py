"""Plans built on a CPU: every lowering, several GPUs, the same plan every time, and what cannot be built."""

from __future__ import annotations

import builtins
import re
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from herdgraph.errors import HerdError
from herdgraph.export.graph.capture import capture_vision
from herdgraph.export.passes import LowerExpertsDense, LowerExpertsFused, LowerExpertsGathered, LowerExpertsUnrolled
from herdgraph.export.passes.layout import compute_in
from herdgraph.export.targets.tensorrt import Plan
from herdgraph.export.targets.tensorrt.builder import Profile, build_plan, check_targets
from herdgraph.export.targets.tensorrt.enterprise import build_plan_here
from support import herds, plans

SM = ("89", "120")


@pytest.fixture(scope="module", autouse=True)
def _tensorrt() -> None:
    pytest.importorskip("tensorrt_rtx")


@pytest.mark.parametrize("experts", [LowerExpertsDense, LowerExpertsGathered, LowerExpertsUnrolled])
def test_every_fp8_product_of_a_decoder_is_one(experts: type, tmp_path: Path) -> None:
    onnx = plans.saved(plans.twin(experts=experts, fp8=True), tmp_path)
    check = build_plan(onnx, tmp_path / "p.plan", sm=SM, profiles=(plans.DECODE, plans.PREFILL))
    plan = Plan.read(tmp_path / "p.plan")
    per_layer = 4 * 2 if experts is LowerExpertsUnrolled else 2
    assert check.fp8 == 4 * 2 + 2 * 2 + 2 * 2 + 2 * per_layer, "attention, dense, shared, routed"
    assert {row.found for row in check.rows if "router" in row.gemm} == {"fp32 x fp32"}
    assert plan.targets == SM
    caches = {name: tensor.dtype for name, tensor in (plan.inputs | plan.outputs).items()
              if name.startswith(("past.", "new."))}
    assert len(caches) == 4 * 4
    assert set(caches.values()) == {"bf16"}


def test_fp8_caches(tmp_path: Path) -> None:
    onnx = plans.saved(plans.twin(herds.variant(), fp8=True, fp8_caches=True), tmp_path)
    plan = build_plan(onnx, tmp_path / "p.plan", sm=SM, profiles=(plans.DECODE,)).plan
    values = plan.inputs | plan.outputs
    caches = {tensor.dtype for name, tensor in values.items() if name.startswith(("past.", "new."))}
    assert caches == {"fp8_e4m3"}


def test_an_image_tower(tmp_path: Path) -> None:
    onnx = plans.saved(plans.twin(capture=capture_vision, fp8=True), tmp_path, "vision")
    profile = Profile(name="images", tiles=(1, 4, 8))
    check = build_plan(onnx, tmp_path / "p.plan", sm=("120",), profiles=(profile,))
    assert check.fp8 == 2 * 4 + 3
    assert check.plan.inputs["pixel_values"].dtype == "float"


def test_the_same_model_gives_the_same_plan(tmp_path: Path) -> None:
    """Not the same bytes: TensorRT numbers values, and lays out the sizes that it computes with, in no fixed order."""
    onnx = plans.saved(plans.twin(herds.variant(), fp8=True), tmp_path)
    first, second = (
        build_plan(onnx, tmp_path / name, sm=SM, profiles=(plans.DECODE,)).plan for name in ("a", "b")
    )
    compiled, again = (_compiled(tmp_path / name) for name in ("a", "b"))
    assert len(compiled) > 1
    assert compiled == again
    assert first.constant_bytes() == second.constant_bytes()
    products, again_products = (
        [(gemm.layers, gemm.a.dtype, gemm.b.dtype, gemm.alpha) for gemm in plan.gemms] for plan in (first, second)
    )
    assert products == again_products
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "decoder.onnx", "decoder.data"}


def _compiled(plan: Path) -> list[list[bytes]]:
    """The lines of each compiled graph, sorted, without the numbers of values and their places in memory."""
    texts = re.findall(rb"header \{\n  version =[^\0]*", plan.read_bytes())
    return [sorted(re.sub(rb"__mye\d+|offset=\d+", b"_", text).splitlines()) for text in texts]


def test_bfloat16_for_older_gpus_and_fp8_not(tmp_path: Path) -> None:
    onnx = plans.saved(plans.twin(herds.variant()), tmp_path)
    plan = build_plan(onnx, tmp_path / "p.plan", sm=("80", "89"), profiles=(plans.DECODE,)).plan
    assert plan.targets == ("80", "89")
    assert "fp8_e4m3" not in plan.constant_bytes()


@pytest.mark.parametrize(("sm", "message"), [
    (("86", "89"), "SM 86 has no FP8 arithmetic: build for SM 89, 120, 121, or with recipe bf16"),
    (("90",), "SM 90 is not among those that TensorRT-RTX compiles for without the GPU"),
    (("100",), "build with --target tensorrt on a machine that has it"),
    ((), "no compute capability was given"),
])
def test_gpus_that_cannot_be_built_for(sm: tuple[str, ...], message: str) -> None:
    with pytest.raises(HerdError, match=message):
        check_targets(sm, fp8=True)


def test_what_tensorrt_objects_to_is_told(tmp_path: Path) -> None:
    model = plans.twin(herds.variant())
    node = next(node for node in model.graph if node.op_type == "Attention")
    node.attributes["softcap"] = ir.AttrFloat32("softcap", 3.0)
    onnx = plans.saved(model, tmp_path)
    with pytest.raises(HerdError, match=r"TensorRT cannot read decoder.onnx: .*softcap") as raised:
        build_plan(onnx, tmp_path / "p.plan", profiles=(plans.DECODE,))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "p.plan").exists()


def test_a_build_that_fails_gives_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A constant per expert right before a ``QuantizeLinear``: ``ComputeIn`` is what keeps the two apart."""
    monkeypatch.setattr(compute_in, "_prepares_what_is_quantized", lambda _: False)
    onnx = plans.saved(plans.twin(herds.variant(), fp8=True), tmp_path)
    with pytest.raises(HerdError, match=r"tensorrt_rtx 1.7.* cannot build decoder.onnx: .*quantize_ppg"):
        build_plan(onnx, tmp_path / "p.plan", profiles=(plans.DECODE,))


def test_fused_experts_are_read_and_not_built(tmp_path: Path) -> None:
    onnx = plans.saved(plans.twin(herds.variant(), LowerExpertsFused), tmp_path)
    with pytest.raises(HerdError, match=r"tensorrt_rtx .* cannot build decoder.onnx: .*moe"):
        build_plan(onnx, tmp_path / "p.plan", sm=("120",), profiles=(plans.DECODE,))


def test_without_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx, real = plans.saved(plans.twin(herds.variant()), tmp_path), builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name in ("tensorrt_rtx", "tensorrt"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(HerdError, match=r"tensorrt_rtx is not installed: pip install 'herdgraph\[tensorrt-rtx\]'"):
        build_plan(onnx, tmp_path / "p.plan", profiles=(plans.DECODE,))
    with pytest.raises(HerdError, match=r"tensorrt is not installed: pip install 'herdgraph\[tensorrt\]' on"):
        build_plan_here(onnx, tmp_path / "p.plan", profiles=(plans.DECODE,))
