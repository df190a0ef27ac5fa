"""From a weight, as a recipe wants it stored, to the initializers of one of our own operators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from ....model.quantization.calibration_file import CalibrationFile
from ....model.quantization.formats import ChannelFormat
from ....model.quantization.packed_sizes import can_pack
from ....model.quantization.recipes import Recipe
from ...graph.builder import Builder
from ...weights.origin import origin_of
from ...weights.packed import INT8_BLOCKS, Packable, PackedExperts, PackedMatrix, PackedScales, format_number
from ..quantize._hessians import hessian_of

DOMAIN = "herdgraph.cpu"
"""ONNX domain of our own CPU operators."""


@dataclass(frozen=True)
class Packer:
    """Packs weights by a recipe.

    Attributes:
        recipe: says which weight is stored how.
        calibration: Hessians of inputs.
    """

    recipe: Recipe
    calibration: CalibrationFile | None

    def layout_of(self, *tensors: ir.TensorProtocol) -> Packable:
        """The format of a weight, or of several that are stored as one."""
        layout = self.recipe.layout_of(*(name for tensor in tensors for name in origin_of(tensor).names))
        assert can_pack(layout), "asked for only after can_pack"
        return layout  # type: ignore[return-value]

    def can_pack(self, *tensors: ir.TensorProtocol) -> bool:
        """Whether our operators have the format of a weight."""
        return can_pack(self.recipe.layout_of(*(name for tensor in tensors for name in origin_of(tensor).names)))

    def can_mix(self, *tensors: ir.TensorProtocol) -> bool:
        """Whether mixtures have the format of a weight: rows are shared by experts of several formats."""
        return self.can_pack(*tensors) and format_number(self.layout_of(*tensors)) != INT8_BLOCKS

    def matrix(self, build: Builder, name: str, source: ir.TensorProtocol, layout: Packable) -> list[ir.Value | None]:
        """Codes and scales of a matrix [K, N]; there are no scales but those of 8-bit channels."""
        return self.stored(build, name, self._packed(source, layout), layout)

    def experts(
        self, build: Builder, name: str, sources: Sequence[ir.TensorProtocol], layout: Packable
    ) -> list[ir.Value | None]:
        """Codes and scales of one matrix of every expert."""
        return self.stored(build, name, PackedExperts([self._packed(source, layout) for source in sources]), layout)

    def _packed(self, source: ir.TensorProtocol, layout: Packable) -> PackedMatrix:
        hessian = None if layout is None else hessian_of(source, layout, self.calibration)
        return PackedMatrix(source, layout, hessian)

    @staticmethod
    def stored(
        build: Builder, name: str, codes: PackedMatrix | PackedExperts, layout: Packable
    ) -> list[ir.Value | None]:
        """Codes as initializers, and scales where they have some of their own."""
        stored: list[ir.Value | None] = [build.weight(f"{name}.codes", codes), None]
        if isinstance(layout, ChannelFormat):
            stored[1] = build.weight(f"{name}.scales", PackedScales(codes))
        return stored


def take_place(graph: ir.Graph, end: ir.Node, build: Builder, y: ir.Value) -> None:
    """Let a new value take the place of the result of ``end``; what nothing reads any more is left to be removed."""
    for weight in build.weights:
        graph.register_initializer(weight)
    graph.insert_before(end, build.nodes)
    old = end.outputs[0]
    for index, value in enumerate(graph.outputs):
        if value is old:
            graph.outputs[index] = y
            old.name, y.name = None, old.name
    old.replace_all_uses_with(y)
