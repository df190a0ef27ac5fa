"""Plans in bundles: from a checkpoint to a proved plan, read by inspect, refused by name where they do not belong."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from herdgraph.calibration.calibrate import calibrate
from herdgraph.calibration.windows import Data, Window
from herdgraph.cli import main
from herdgraph.errors import HerdError
from herdgraph.export.targets.options import PlanOptions
from herdgraph.export.targets.tensorrt.plans import profiles_of
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.config.presets import SCOUT, TINY
from herdgraph.runtimes import Engine
from herdgraph.runtimes.bundle.manifest import Bundle
from herdgraph.runtimes.executors.tensorrt.load import check_device, check_version
from support import herds

pytest.importorskip("tensorrt_rtx")


def herdgraph(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    directory = tmp_path_factory.mktemp("plans")
    checkpoint, calibration, bundle = (directory / name for name in ("checkpoint", "calibration", "bundle"))
    herds.save(TINY, checkpoint)
    herds.write_processor(checkpoint)
    vision = TINY.vision
    assert vision is not None
    pixels = herds.torch.randn(2, 3, vision.image_size, vision.image_size).numpy()
    patches = [TINY.image_token_id] * (2 * vision.tokens_per_tile)
    data = Data([Window(herds.tokens(60, seed)) for seed in range(3)] + [Window([*patches, 5, 6], pixels)], [])
    with open_checkpoint(checkpoint) as source:
        calibrate(source, calibration, data)
    done = herdgraph("build", checkpoint, "-o", bundle, "--target", "tensorrt-rtx", "--recipe", "fp8", "--calibration",
                     calibration, "--kv", "fp8", "--context", 512, "--json")
    assert done.exit_code == 0, done.output
    return checkpoint, calibration, bundle


def test_every_intended_product_is_fp8_in_decoder_and_tower(paths: tuple[Path, Path, Path]) -> None:
    manifest = Bundle.open(paths[2]).manifest
    assert set(manifest.plans) == {"decoder", "vision"}
    for plan in manifest.plans.values():
        assert plan["fp8_products"] == plan["fp8_intended"] > 0
        assert plan["fallbacks"] == []
        assert plan["sm"] == ["89", "120"]
    assert {path.name for path in paths[2].iterdir()} == {"decoder.plan", "vision.plan", "manifest.json", "processor"}


def test_inspect_reads_plans(paths: tuple[Path, Path, Path]) -> None:
    found = json.loads(herdgraph("inspect", paths[2] / "decoder.plan", "--json").output)
    assert found["sm"] == ["89", "120"]
    assert found["inputs"]["past.0.key"].startswith("fp8_e4m3[")
    assert found["outputs"]["logits"].startswith("float[")
    fp8 = [row for row in found["products"] if row["left"].startswith("fp8") and row["right"].startswith("fp8")]
    assert len(fp8) == 2 * Bundle.open(paths[2]).manifest.plans["decoder"]["fp8_products"], "once per profile"
    shown = herdgraph("inspect", paths[2], "--products").output
    for text in ("SM", "89, 120", "fp8_e4m3 x fp8_e4m3", "layers.1.feed_forward.experts", "past.*.key",
                 "KV cache (fp8)"):
        assert text in shown


def test_a_plan_is_refused_without_a_gpu_in_one_line(paths: tuple[Path, Path, Path]) -> None:
    with pytest.raises(HerdError, match=r"cuda|CUDA"):
        Engine.load(paths[2])


def test_other_versions_and_gpus_are_refused_by_name() -> None:
    plan: dict[str, Any] = {"tensorrt": "1.7.1.116", "sm": ["89", "120"]}
    check_version("decoder", plan, "tensorrt_rtx", "1.7.1.116")
    check_device("decoder", plan, "120")
    with pytest.raises(HerdError, match=r"built by TensorRT 1\.7\.1\.116, tensorrt_rtx 1\.8 is installed"):
        check_version("decoder", plan, "tensorrt_rtx", "1.8")
    with pytest.raises(HerdError, match=r"for SM 89, 120, this GPU is SM 90: .*--sm 90"):
        check_device("decoder", plan, "90")


@pytest.mark.parametrize(("arguments", "message"), [
    (["--sm", "90"], "SM 90 is not among those that TensorRT-RTX compiles for without the GPU"),
    (["--sm", "80"], "SM 80 has no FP8 arithmetic"),
    (["--sm", ","], "no compute capability was given"),
    (["--kv", "int8"], "cannot store keys and values as int8: choose one of float, fp8"),
    (["--target", "tensorrt"], "tensorrt is not installed"),
    (["--target", "tensorrt-rtx", "--recipe", "int8"], "has no recipe 'int8'"),
])
def test_what_cannot_be_built_is_said_before_anything_is_done(
    paths: tuple[Path, Path, Path], tmp_path: Path, arguments: list[str], message: str
) -> None:
    checkpoint, calibration, _ = paths
    done = herdgraph("build", checkpoint, "-o", tmp_path / "b", "--target", "tensorrt-rtx", "--recipe", "fp8",
                     "--calibration", calibration, *arguments)
    assert done.exit_code == 1
    assert message in done.output
    assert "Traceback" not in done.output
    assert not (tmp_path / "b").exists()


def test_a_missing_package_names_its_extra(
    paths: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("tensorrt_rtx"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    done = herdgraph("build", paths[0], "-o", tmp_path / "b", "--target", "tensorrt-rtx", "--recipe", "bf16")
    assert done.exit_code == 1
    assert "herdgraph[tensorrt-rtx]" in done.output


def test_profiles_follow_the_model_and_its_limits() -> None:
    decode, prefill = profiles_of(SCOUT, "decoder", PlanOptions(batch=4))
    assert decode.batch == (1, 1, 4)
    assert decode.tokens == (1, 1, 1)
    assert decode.slots_local[2] == 8192, "a chunk"
    assert decode.slots_global[2] == 1 << 17
    assert prefill.tokens[2] <= 8192
    assert [p.name for p in profiles_of(SCOUT, "decoder", PlanOptions(profile="prefill"))] == ["prefill"]
    small = profiles_of(TINY, "decoder", PlanOptions(context=8))[1]
    assert small.slots_local[2] == small.slots_global[2] == small.tokens[2] == 8
    assert profiles_of(SCOUT, "vision", PlanOptions())[0].tiles[2] == 17
    with pytest.raises(HerdError, match="no profile is called 'fast'"):
        PlanOptions(profile="fast")
