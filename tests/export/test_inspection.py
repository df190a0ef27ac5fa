"""Descriptions: what a checkpoint, a bundle and a pipeline hold, as objects; the command only prints them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from herdgraph.errors import HerdError
from herdgraph.export.inspection import BundleDescription, CheckpointDescription, describe, describe_pipeline
from herdgraph.export.planner.storage import Storage
from herdgraph.export.planner.traffic import cache_bytes
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.config.presets import TINY
from herdgraph.runtimes.bundle.manifest import MANIFEST, Manifest, describe_files
from support import herds


def test_checkpoint(tmp_path: Path) -> None:
    herds.save(TINY, tmp_path / "checkpoint")
    found = describe(tmp_path / "checkpoint")
    assert isinstance(found, CheckpointDescription)
    with open_checkpoint(tmp_path / "checkpoint") as checkpoint:
        assert (found.config, found.fingerprint) == (checkpoint.config, checkpoint.fingerprint())
        assert set(found.files) == {path.name for path in checkpoint.weight_files}
    assert sum(found.files.values()) > 4 * found.size.total, "float32 and a header"
    assert json.loads(json.dumps(found.to_json()))["facts"] == found.size.to_json()


@pytest.mark.parametrize(("target", "plan_files"), [("cpu", []), ("tensorrt-rtx", ["decoder.plan"])])
def test_bundle(tmp_path: Path, target: str, plan_files: list[str]) -> None:
    """Plans are named for targets whose plans can be read; their own entry stands in the JSON only if there are any."""
    (tmp_path / "decoder").write_bytes(b"graph")
    plans = {"decoder": {"sm": ["89"]}} if plan_files else {}
    manifest = Manifest(target=target, executor="onnxruntime", provider="", recipe="fp32", plans=plans, active_bytes=1,
                        config=replace(TINY, vision=None), graphs={"decoder": "decoder"},
                        files=describe_files(tmp_path))
    (tmp_path / MANIFEST).write_text(json.dumps(manifest.to_json()))
    found = describe(tmp_path)
    assert isinstance(found, BundleDescription)
    assert [path.name for path in found.plan_files] == plan_files
    document = found.to_json()
    assert document["files"]["decoder"] == (5, manifest.files["decoder"].sha256)
    assert ("plans" in document) == bool(plan_files)


@pytest.mark.parametrize(("target", "caches", "row"), [
    ("cpu", "int8", 16 + 4), ("cpu", "float32", 64), ("cpu-stock", "int8", 16), ("tensorrt", "fp8", 16),
    ("cpu", None, 32), ("tensorrt-rtx", "int64", 32),
])
def test_bytes_of_caches(target: str, caches: str | None, row: int) -> None:
    """Every token of 8-bit cache blocks has scales; types that are not known count as 16 bit."""
    manifest = Manifest(target=target, executor="", provider="", recipe="int8", active_bytes=1, config=TINY,
                        graphs={}, files={})
    found, text = BundleDescription(Path(), manifest, caches, "").size, TINY.text
    layers = [bool(text.chunk_of(layer)) for layer in range(text.num_layers)]
    assert (found.kv_global_bytes, found.kv_local_bytes) == tuple(
        2 * text.num_kv_heads * row * layers.count(local) for local in (False, True))
    if target == "cpu" and caches:
        assert 64 * found.kv_global_bytes + found.kv_local_cap_bytes == cache_bytes(
            text, Storage("int8", caches, on_cpu=True), 64), "what the planner says"


def test_pipeline_by_name() -> None:
    found = describe_pipeline("cpu:int4")
    assert (found.target, found.recipe) == ("cpu", "int4")
    assert found.passes[-1][0] == "Tidy"
    assert [each["name"] for each in found.to_json()["passes"]] == [name for name, _ in found.passes]
    assert describe_pipeline("cpu").recipe == "fp32", "the target's first"


def test_nothing_to_describe(tmp_path: Path) -> None:
    with pytest.raises(HerdError, match="does not exist"):
        describe(tmp_path / "none")
