"""ONNX graphs for checks: floating-point inputs and outputs are float32, inside is the type that is checked."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from onnx import TensorProto, helper

Array = np.ndarray[Any, Any]

TYPES: dict[str, tuple[int, Any]] = {
    "fp32": (TensorProto.FLOAT, np.float32), "fp16": (TensorProto.FLOAT16, np.float16),
    "bf16": (TensorProto.BFLOAT16, ml_dtypes.bfloat16), "int32": (TensorProto.INT32, np.int32),
    "int64": (TensorProto.INT64, np.int64), "int8": (TensorProto.INT8, np.int8), "uint8": (TensorProto.UINT8, np.uint8),
    "fp8": (TensorProto.FLOAT8E4M3FN, ml_dtypes.float8_e4m3fn),
}
CONTRIB = "com.microsoft"


class Graph:
    """A graph that grows.

    Args:
        kind: the type that it computes in: ``fp32``, ``fp16`` or ``bf16``.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._nodes: list[Any] = []
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._weights: list[Any] = []

    def input(self, name: str, kind: str, shape: list[int | str]) -> str:
        """An input of a type."""
        self._inputs.append(helper.make_tensor_value_info(name, TYPES[kind][0], shape))
        return name

    def activation(self, name: str, shape: list[int | str]) -> str:
        """A float32 input, converted to the graph's type."""
        return self.cast(self.input(name, "fp32", shape), self.kind)

    def weight(self, name: str, array: Array, kind: str | None = None) -> str:
        """A weight in a type, the graph's unless another is given."""
        number, dtype = TYPES[kind or self.kind]
        data = np.ascontiguousarray(array.astype(dtype)).tobytes()
        self._weights.append(helper.make_tensor(name, number, array.shape, data, raw=True))
        return name

    def external(self, name: str, shape: list[int], kind: str, location: str, offset: int = 0) -> str:
        """A weight whose bytes lie in a file; several may share them."""
        tensor = TensorProto(name=name, data_type=TYPES[kind][0], dims=shape, data_location=TensorProto.EXTERNAL)
        length = int(np.prod(shape)) * np.dtype(TYPES[kind][1]).itemsize
        for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
            tensor.external_data.add(key=key, value=value)
        self._weights.append(tensor)
        return name

    def add(
        self, op: str, *inputs: str, outputs: int | tuple[str, ...] = 1, domain: str = "", **attributes: Any
    ) -> Any:
        """A node; the name of its output, or the names of all. Outputs that are not wanted are called ``""``."""
        unique = f"{op.lower()}_{len(self._nodes)}"
        names = outputs if isinstance(outputs, tuple) else tuple(f"{unique}_{i}" for i in range(outputs))
        self._nodes.append(helper.make_node(op, list(inputs), list(names), name=unique, domain=domain, **attributes))
        return names[0] if len(names) == 1 else names

    def cast(self, value: str, kind: str) -> str:
        """A value in another type; itself where it may have that type already."""
        return value if kind == "fp32" == self.kind else str(self.add("Cast", value, to=TYPES[kind][0]))

    def output(self, value: str, name: str, shape: list[int | str], kind: str | None = None) -> None:
        """A result: in float32, or as it is where its type is given."""
        if kind is None:
            self.add("Cast", value, outputs=(name,), to=TensorProto.FLOAT)
        self._outputs.append(helper.make_tensor_value_info(name, TYPES[kind or "fp32"][0], shape))

    def model(self) -> bytes:
        """The model, serialized."""
        graph = helper.make_graph(self._nodes, "check", self._inputs, self._outputs, self._weights)
        opsets = [helper.make_opsetid("", 24), helper.make_opsetid(CONTRIB, 1)]
        return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=11).SerializeToString())
