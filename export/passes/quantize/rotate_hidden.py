"""Spread what stands out in the input of ``down_proj`` before it is quantised.

    y = h W = (h B) (B^T W),   B = blocks of a Hadamard matrix on the diagonal

The residual stream is rotated once and for all in the weights (``model/checkpoint/rotated.py``); the product of
silu(gate) and up is not linear, so its rotation runs with the model. Blocks of at most 64 keep that below a tenth of
the product that follows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import InPlacePass, PassResult

from ....model.checkpoint.rotated import hadamard, power_of_two_in
from ...graph.builder import Builder
from ...weights.origin import origin_of, with_origin
from ...weights.stream import channels_of, chunk_rows, regrouped, write_channels
from ..report import report

LARGEST_BLOCK = 64
SMALLEST_BLOCK = 8
"""Below, a block has too few inputs to spread anything over."""


class RotateHidden(InPlacePass):
    """Rotate the input of every ``down_proj`` and its weight, in the experts' branches too."""

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite all graphs of the model."""
        found = [(graph, node) for graph in model.graphs() for node in graph if self._applies(node)]
        for graph, node in found:
            self._rotate(graph, node)
        return report(self, model, [node for _, node in found])

    @staticmethod
    def _applies(node: ir.Node) -> bool:
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        return (
            weight is not None and weight.const_value is not None and "down_proj" in origin_of(weight.const_value).name
            and power_of_two_in(int(weight.const_value.shape.numpy()[0]), LARGEST_BLOCK) >= SMALLEST_BLOCK
        )

    @staticmethod
    def _rotate(graph: ir.Graph, node: ir.Node) -> None:
        x, weight = node.inputs
        assert x is not None
        assert weight is not None
        assert weight.const_value is not None
        width = int(weight.const_value.shape.numpy()[0])
        block = power_of_two_in(width, LARGEST_BLOCK)
        build = Builder(f"{node.name}/rotated")
        matrix = build("Constant", value=ir.Tensor(hadamard(block).numpy()))
        # Rank 3 or, in experts and mixture layers, 2; 0 keeps a dimension.
        kept = [0, 0] if x.shape is not None and len(x.shape) == 3 else [-1]
        blocks = build("MatMul", build("Reshape", x, build.constant([*kept, width // block, block])), matrix)
        rotated = build("Reshape", blocks, build.constant([*kept, width]))
        graph.insert_before(node, build.nodes)
        node.replace_input_with(0, rotated)
        weight.const_value = BlockRotated(weight.const_value, block)


class BlockRotated(ir.LazyTensor):
    """B^T W for a weight W [K, N], streamed."""

    def __init__(self, source: ir.TensorProtocol, block: int) -> None:
        self.source, self.block = source, block
        super().__init__(
            lambda: ir.Tensor(np.ascontiguousarray(np.concatenate(list(self.channels())).T)),
            dtype=ir.DataType.FLOAT, shape=source.shape,  # type: ignore[arg-type]
        )
        with_origin(self, origin_of(source))

    def channels(self) -> Iterator[np.ndarray[Any, Any]]:
        """Output channels in order, a few at a time: rows [n, K]."""
        for rows_NK in regrouped(channels_of(self.source), chunk_rows(int(self.shape.numpy()[0]))):
            yield self._rotate(torch.from_numpy(rows_NK)).numpy()

    def rotated_hessian(self, hessian_KK: torch.Tensor) -> torch.Tensor:
        """The Hessian of the inputs h B for that of h: B^T H B."""
        return self._rotate(self._rotate(hessian_KK).T)

    def _rotate(self, rows: torch.Tensor) -> torch.Tensor:
        return (rows.unflatten(1, (-1, self.block)) @ hadamard(self.block)).flatten(1)

    def write_to(self, file: int, offset: int) -> None:
        """Write float32 little-endian values at ``offset`` of an open file descriptor."""
        write_channels(file, self.channels(), offset, width=int(self.shape.numpy()[1]))
