"""The native library on every unit that this machine runs, each in a copy that chose it, and models of one node."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from herdgraph.runtimes.native import compile as native_compile

TARGET = native_compile.this_machine()
UNITS = tuple(TARGET.units) if TARGET else ()
TYPES = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.uint8): TensorProto.UINT8,
         np.dtype(np.int32): TensorProto.INT32, np.dtype(np.int64): TensorProto.INT64}
Run = Callable[..., list[np.ndarray]]


@pytest.fixture(scope="session")
def built_library() -> Path:
    """The library of the sources as they are."""
    path = native_compile.built_library()
    if not (TARGET and path):
        pytest.skip("no units for this machine")
    if native_compile.is_outdated(path):
        try:
            native_compile.compile_library(TARGET)
        except native_compile.CompileError as error:
            pytest.skip(str(error))
    return path


@pytest.fixture(scope="session", params=UNITS)
def library(request: pytest.FixtureRequest, built_library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the library, loaded with HERDGRAPH_UNIT: a library chooses once."""
    path = Path(shutil.copy(built_library, tmp_path_factory.mktemp(request.param)))
    os.environ["HERDGRAPH_UNIT"] = request.param
    try:
        unit = ctypes.CDLL(str(path)).herdgraph_unit
        unit.restype = ctypes.c_char_p
        chosen = unit().decode()
    finally:
        del os.environ["HERDGRAPH_UNIT"]
    if chosen != request.param:
        pytest.skip(f"this processor has no {request.param}")
    return path


@pytest.fixture
def node(library: Path) -> Callable[..., Run]:
    """Makes a session of one node: inputs that are arrays become weights, the others are fed by name."""

    def make(operator: str, attributes: dict[str, Any], weights: dict[str, np.ndarray | None], names: list[str],
             outputs: int = 1, threads: int = 1) -> Run:
        kept = {name: array for name, array in weights.items() if array is not None}
        sessions: dict[object, onnxruntime.InferenceSession] = {}

        def run(**feed: np.ndarray) -> list[np.ndarray]:
            key = tuple((name, array.ndim) for name, array in feed.items())
            if key not in sessions:
                present = [name if name in kept or name in feed else "" for name in names]
                sessions[key] = session(library, operator, attributes, kept, present, feed, outputs, threads)
            return sessions[key].run(None, feed)

        return run

    return make


def session(library: Path, operator: str, attributes: dict[str, Any], weights: dict[str, np.ndarray],
            names: list[str], feed: dict[str, np.ndarray], outputs: int, threads: int) -> onnxruntime.InferenceSession:
    """A model that is one node; shapes are free."""
    def value(name: str, array: np.ndarray) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TYPES[array.dtype], [f"{name}{i}" for i in range(array.ndim)])

    kinds = [TensorProto.FLOAT, TensorProto.UINT8, TensorProto.UINT8]
    results = [helper.make_tensor_value_info(f"y{i}", kinds[i], None) for i in range(outputs)]
    made = helper.make_node(operator, names, [result.name for result in results], domain="herdgraph.cpu", **attributes)
    inputs = [value(name, array) for name, array in feed.items()]
    initializers = [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph([made], "g", inputs, results, initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("herdgraph.cpu", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
