"""Sessions on ONNX Runtime: graphs that are not ours are refused before they run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from herdgraph.errors import HerdError
from herdgraph.model.config.presets import TINY
from herdgraph.runtimes.executors.options import ExecutorOptions
from herdgraph.runtimes.executors.ort import session
from herdgraph.runtimes.executors.ort.session import check_names, create_session
from herdgraph.runtimes.executors.vision import VisionRunner


def _save(nodes: list[onnx.NodeProto], path: Path) -> Path:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(nodes, "g", [value("x", TensorProto.FLOAT, [2])], [value("y", TensorProto.FLOAT, [2])])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def _session(path: Path):
    return create_session(path, provider="CPUExecutionProvider", options=ExecutorOptions(threads=1))


def test_check_names(tmp_path: Path) -> None:
    path = _save([helper.make_node("Relu", ["x"], ["y"])], tmp_path / "g.onnx")
    loaded = _session(path)
    check_names(loaded, path, inputs={"x"}, outputs={"y"})
    for inputs, outputs, problem in (({"a", "x"}, {"y"}, "no input 'a'"), (set(), {"y"}, "an unknown input 'x'"),
                                     ({"x"}, {"y", "z"}, "no output 'z'"), ({"x"}, set(), "an unknown output 'y'")):
        with pytest.raises(HerdError, match=f"g.onnx has {problem}: it is another graph"):
            check_names(loaded, path, inputs=inputs, outputs=outputs)


def test_a_graph_of_our_operators_without_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _save([helper.make_node("Project", ["x"], ["y"], domain="herdgraph.cpu")], tmp_path / "g.onnx")
    monkeypatch.setattr(session, "library_path", lambda: None)
    with pytest.raises(HerdError, match=r"^\S+g\.onnx needs herdgraph's own CPU operators, which are not installed "
                                        r"here: .*\(docs/native\.md\); or build the bundle with --target cpu-stock$"):
        _session(path)


def test_graphs_that_may_never_end_are_refused(tmp_path: Path) -> None:
    """With true as its condition and no number of trips, this Loop runs for ever."""
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["c2"]), helper.make_node("Relu", ["v"], ["v2"])], "body",
        [value("i", TensorProto.INT64, []), value("c", TensorProto.BOOL, []), value("v", TensorProto.FLOAT, [2])],
        [value("c2", TensorProto.BOOL, []), value("v2", TensorProto.FLOAT, [2])])
    true = helper.make_node("Constant", [], ["t"], value=helper.make_tensor("t", TensorProto.BOOL, [], [True]))
    path = _save([true, helper.make_node("Loop", ["", "t", "x"], ["y"], body=body)], tmp_path / "g.onnx")
    onnx.checker.check_model(path)
    with pytest.raises(HerdError, match=r"holds a loop, .* may never end"):
        _session(path)


def test_features_of_another_model_are_refused() -> None:
    runner = VisionRunner(lambda tiles: np.zeros((len(tiles), 3), np.float32), TINY)
    with pytest.raises(HerdError, match=r"gives features \[1, 3\] for 1 tiles, \[4, 64\] is needed"):
        runner.features(np.zeros((1, 3, 28, 28), np.float32))
