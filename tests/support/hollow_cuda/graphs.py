"""Graphs of any size without their weights: a file of zeros that takes no room on a disk."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir

HEADER = '<ir_version: 11, opset_import: ["" : 24, "com.microsoft" : 1]>\n'
ALIGNMENT = 4096


def parse(text: str) -> ir.Model:
    """A graph from ONNX text; inputs called ``w_...`` are weights."""
    model = ir.from_proto(onnx.parser.parse_model(HEADER + text))
    for value in [value for value in model.graph.inputs if str(value.name).startswith("w_")]:
        model.graph.inputs.remove(value)
        assert value.shape is not None and value.dtype is not None  # noqa: PT018
        value.const_value = ir.LazyTensor(_unread, dtype=value.dtype, shape=value.shape, name=value.name)
        model.graph.register_initializer(value)
    return model


def save(model: ir.Model, directory: Path) -> str:
    """Write a graph whose lazy weights become zeros, unread."""
    end, placed = 0, {}
    for value in [value for graph in model.graphs() for value in graph.initializers.values()]:
        tensor = value.const_value
        if not isinstance(tensor, ir.LazyTensor):
            continue
        if id(tensor) not in placed:
            placed[id(tensor)] = tensor, ir.ExternalTensor(
                "weights", end, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=str(value.name),
                base_dir=directory)
            end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        value.const_value = placed[id(tensor)][1]
    with (directory / "weights").open("wb") as file:
        file.truncate(end)
    path = directory / "graph.onnx"
    path.write_bytes(ir.to_proto(model).SerializeToString())
    return str(path)


def _unread() -> ir.Tensor:
    raise AssertionError("a hollow weight has no values")
