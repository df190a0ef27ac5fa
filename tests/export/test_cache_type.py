"""The type of keys and values, found in the file of a graph without ONNX."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from herdgraph.export.cache_type import cache_type
from herdgraph.model.config.presets import TINY
from herdgraph.runtimes.bundle.manifest import Bundle, Manifest


def _bundle(directory: Path, name: str) -> Bundle:
    manifest = Manifest(target="cpu", executor="onnxruntime", provider="", recipe="fp32", active_bytes=1, config=TINY,
                        graphs={"decoder": name}, files={})
    return Bundle(directory, manifest)


@pytest.mark.parametrize(("element", "name"), [
    (TensorProto.FLOAT, "float32"), (TensorProto.INT8, "int8"), (TensorProto.BFLOAT16, "bf16"),
    (TensorProto.FLOAT8E4M3FN, "fp8"), (TensorProto.STRING, None),
])
def test_type_of_an_input(element: int, name: str | None, tmp_path: Path) -> None:
    inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["B", "T"]),
              helper.make_tensor_value_info("past.0.key", element, ["B", 2, "S", 16])]
    weights = [helper.make_tensor("w", TensorProto.FLOAT, [2], [1.0, 2.0])]
    graph = helper.make_graph([helper.make_node("Identity", ["w"], ["out"])], "decoder", inputs, [], weights)
    onnx.save(helper.make_model(graph), tmp_path / "decoder.onnx")
    assert cache_type(_bundle(tmp_path, "decoder.onnx")) == name


@pytest.mark.parametrize(("size", "name"), [(64 * 32 * 4, "float32"), (64 * 32 * 2, "float16"),
                                            (64 * 32 + 2 * 64 * 4, "int8"), (64 * 32, None)])
def test_type_of_cache_blocks(size: int, name: str | None, tmp_path: Path) -> None:
    """TINY has 2 heads of 16 for keys and values; blocks are bytes of 64 tokens."""
    inputs = [helper.make_tensor_value_info("past.0.key", TensorProto.UINT8, ["pool", size])]
    graph = helper.make_graph([helper.make_node("Identity", ["past.0.key"], ["out"])], "decoder", inputs, [])
    onnx.save(helper.make_model(graph), tmp_path / "decoder.onnx")
    assert cache_type(_bundle(tmp_path, "decoder.onnx")) == name


def test_what_is_no_graph_says_nothing(tmp_path: Path) -> None:
    for content in (b"", b"graph", b"\xff" * 50, b":\xff\xff\x01"):
        (tmp_path / "decoder.onnx").write_bytes(content)
        assert cache_type(_bundle(tmp_path, "decoder.onnx")) is None
    assert cache_type(_bundle(tmp_path, "decoder.plan")) is None
