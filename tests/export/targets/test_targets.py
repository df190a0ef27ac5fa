"""Targets: which passes they are made of, and which lowering of experts a GPU gets."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from herdgraph.errors import HerdError
from herdgraph.export.graph.capture import capture_decoder
from herdgraph.export.targets.canonical import CANONICAL, CanonicalTarget
from herdgraph.export.targets.describe import described_passes
from herdgraph.export.targets.options import PROFILES, PlanOptions
from herdgraph.export.targets.registry import TARGETS, target_of
from herdgraph.export.targets.tensorrt import enterprise
from herdgraph.model.config.presets import TINY
from herdgraph.model.quantization.recipes import RECIPES


def names(target: str, recipe: str, **options: str) -> list[str]:
    return [name for name, _ in described_passes(*target_of(target, recipe), PlanOptions(**options))]


def test_pipeline_of_the_cpu() -> None:
    """FP8 products are emulated with standard operators, which leaves nothing of ours but attention."""
    begin = ["PackTokens", "FoldWeightTransposes"]
    attention, experts = "LowerPagedAttention", "LowerRoutedExperts"
    lowering = [*begin, "LowerMixtures", "JoinMatMuls", attention, "LowerFullAttention", experts, "LowerTiedTable",
                "LowerProjects"]
    assert names("cpu", "fp32") == [*lowering, "Tidy"]
    assert names("cpu", "int4") == [*lowering, "RotateHidden", "QuantizeMatMuls", "QuantizeTable", "Tidy"]
    assert names("cpu", "fp8") == [*begin, "JoinMatMuls", attention, experts, "QuantizeMatMuls", "QuantizeFp8", "Tidy"]
    int8_caches = replace(RECIPES["int8"], caches="int8", token_scales=True)
    assert [name for name, _ in described_passes(TARGETS["cpu"], int8_caches)] == names("cpu", "int8")


def test_pipeline_of_the_cpu_without_our_operators() -> None:
    lowering = ["FoldWeightTransposes", "JoinMatMuls", "LowerCachedAttention", "LowerRoutedExperts"]
    assert names("cpu-stock", "fp32") == [*lowering, "Tidy"]
    assert names("cpu-stock", "int4") == [*lowering, "RotateHidden", "QuantizeMatMuls", "QuantizeTable", "Tidy"]
    assert names("cpu-stock", "fp8") == [*lowering, "QuantizeMatMuls", "QuantizeFp8", "Tidy"]
    int8_caches = replace(RECIPES["int8"], caches="int8")
    assert [name for name, _ in described_passes(TARGETS["cpu-stock"], int8_caches)][-2:] == ["QuantizeCaches", "Tidy"]


def test_pipeline_of_cuda() -> None:
    """Types come last: what stands before the last three passes runs on a CPU, too."""
    begin = ["PackTokens", "ReshapeRows", "FoldWeightTransposes", "LowerExpertsContrib", "JoinMatMuls",
             "LowerPagedAttention", "JoinResidualNorms"]
    end = ["AddBestToken", "Tidy", "LowerPagedContrib", "ComputeIn", "ScaleByExcess"]
    assert names("cuda", "bf16") == [*begin, *end]
    assert names("cuda", "int4") == names("cuda", "int8") == [*begin, "QuantizeMatMuls", *end]


def test_pipeline_of_the_canonical_graph_is_empty() -> None:
    assert names("canonical", "fp32") == []


def test_every_pass_says_what_it_does_in_a_sentence() -> None:
    for name, target in TARGETS.items():
        for recipe in target.recipes:
            for each, purpose in described_passes(*target_of(name, recipe)):
                assert purpose.endswith("."), each
                assert 20 < len(purpose) < 140, each


@pytest.mark.parametrize("profile", PROFILES)
def test_experts_by_profile(profile: str) -> None:
    expected = {"both": "LowerExpertsDense", "decode": "LowerExpertsGathered", "prefill": "LowerExpertsUnrolled"}
    assert expected[profile] in names("tensorrt-rtx", "bf16", profile=profile)


@pytest.mark.parametrize(("capability", "fused"), [("89", False), ("90", False), ("100", True), ("110", True),
                                                   ("120", False)])
def test_fused_experts_where_the_gpu_has_them(capability: str, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the device: TensorRT's own mixture of experts exists on SM 100 to 119, and not for FP8 here."""
    monkeypatch.setattr(enterprise, "Cuda", lambda: SimpleNamespace(compute_capability=capability))
    assert ("LowerExpertsFused" in names("tensorrt", "bf16")) is fused
    assert "LowerExpertsDense" in names("tensorrt", "fp8")
    assert "LowerExpertsDense" in names("tensorrt-rtx", "bf16"), "it builds for other machines"


def test_without_a_gpu_experts_are_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise HerdError("cudaSetDevice failed: no CUDA-capable device is detected")

    monkeypatch.setattr(enterprise, "Cuda", missing)
    assert "LowerExpertsDense" in names("tensorrt", "bf16")


def test_an_operator_that_is_left_is_a_defect() -> None:
    class Forgetful(CanonicalTarget):
        is_lowered = True

    forgetful = Forgetful("forgetful", "lowers nothing", "onnxruntime", "CPUExecutionProvider")
    with pytest.raises(HerdError, match="target forgetful does not lower CachedAttention, RoutedExperts: report this"):
        forgetful.lower(capture_decoder(TINY), RECIPES["fp32"], PlanOptions())
    CANONICAL.lower(capture_decoder(TINY), RECIPES["fp32"], PlanOptions())
