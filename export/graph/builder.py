"""A few lines that make graph surgery readable: named values, constants and branches on top of onnx-ir's tape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

CONTRIB = "com.microsoft"


class Builder(Tape):
    """Records nodes whose names and values start with ``prefix``.

    Args:
        prefix: module path the new nodes belong to. Names are unique as long as prefixes are.
    """

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix
        self._constants: dict[tuple[Any, ...], ir.Value] = {}
        self.weights: list[ir.Value] = []
        """Initializers of the graph that this builder makes."""

    def __call__(
        self, op_type: str, *inputs: ir.Value | None, outputs: int = 1, domain: str = "", **attributes: Any
    ) -> Any:
        """Add a node; returns its output, or a tuple of them when ``outputs`` is not 1."""
        name = f"{self.prefix}/{op_type}_{len(self.nodes)}"
        values = self.op_multi_out(
            op_type, inputs, num_outputs=outputs, attributes=attributes, domain=domain, name=name,
        )
        for index, value in enumerate(values):
            value.name = name if outputs == 1 else f"{name}:{index}"
        return values[0] if outputs == 1 else tuple(values)

    def constant(self, value: int | Sequence[Any]) -> ir.Value:
        """A small int64 constant; equal ones are shared inside this builder."""
        array = np.asarray(value, dtype=np.int64)
        key = (array.tobytes(), array.shape)
        if key not in self._constants:
            self._constants[key] = self("Constant", value=ir.Tensor(array))
        return self._constants[key]

    def weight(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """An initializer of the graph that this builder makes."""
        value = ir.Value(
            name=f"{self.prefix}/{name}", shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.weights.append(value)
        return value

    def graph(self, *outputs: ir.Value) -> ir.Graph:
        """What was recorded, as a subgraph without inputs."""
        return ir.Graph([], outputs, nodes=self.nodes, initializers=self.weights, name=self.prefix)

    def branch(self, condition: ir.Value, then: Callable[[Builder], Any], otherwise: Callable[[Builder], Any], *,
               outputs: int = 1) -> Any:
        """An ``If`` whose branches are built by two functions; weights made inside stay inside.

        The functions return one value, or a tuple of as many as ``outputs`` says.
        """
        graphs = []
        for name, build in (("then", then), ("else", otherwise)):
            inner = Builder(f"{self.prefix}/{name}_{len(self.nodes)}")
            built = build(inner)
            graphs.append(inner.graph(*(built if outputs > 1 else (built,))))
        return self("If", condition, outputs=outputs, then_branch=graphs[0], else_branch=graphs[1])
