"""``RoutedExperts`` as ONNX Runtime's fused mixture of experts: ``MoE``, or ``QMoE`` with weights in 8 or 4 bits.

The operator multiplies an expert's *output* by its score; Llama 4 multiplies the input, which is another function. So
every assignment of a token to an expert is a row of its own, scaled beforehand, for which one expert is chosen with a
weight of 1:

    x [A, D] · score    choices [A, E]    gate and up in turns [E, 2F, D]    down [E, D, F]   ->   y [A, D]

The operator is not given the router's logits: rounded to 16 bits they may have another largest one, whose expert would
then run on a row with the score of this one. A row of ``choices`` is 0 at the router's expert and -10000 elsewhere,
which leaves nothing to decide in any type.

Weights in 8 bits have a scale per output channel, those in 4 bits one per 32 inputs. Both products are computed in the
type of the row. CPU and CUDA have the operator in this form: gate and up in turns, no zero points, no biases.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import PassResult

from ....errors import HerdError
from ....model.quantization.calibration_file import CalibrationFile
from ....model.quantization.formats import BlockFormat, ChannelFormat
from ....model.quantization.recipes import Recipe
from ...graph.builder import CONTRIB, Builder
from ...weights.block import BlockCodes
from ...weights.channel import ChannelCodes
from ...weights.experts import Interleaved, Stacked, StackedCodes, StackedScales
from ...weights.origin import origin_of
from ...weights.stream import expert_of
from ..quantize._hessians import hessian_of
from ._routing import ExpertsLowering, ExpertsPass

_NOT_CHOSEN = -1e4
_ATTRIBUTES: dict[str, Any] = {
    "k": 1, "normalize_routing_weights": 1, "activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.0,
    "activation_beta": 0.0,
}
"""One expert per row with a weight of 1, and silu(gate) * up of channels in turns."""
_BLOCKS, _CHANNELS = BlockFormat(4, 32, centered=True), ChannelFormat(centered=True)


class LowerExpertsContrib(ExpertsPass):
    """Replace every ``RoutedExperts`` by ``MoE`` or, where the recipe stores experts in integers, by ``QMoE``.

    Args:
        recipe: says which weight is stored how.
        calibration: Hessians of inputs.
    """

    def __init__(self, recipe: Recipe, calibration: CalibrationFile | None = None) -> None:
        super().__init__()
        self.recipe, self.calibration = recipe, calibration

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the main graph."""
        result = super().call(model)
        if result.modified:
            model.opset_imports[CONTRIB] = 1
        return result

    def lowered(self, node: ir.Node) -> ExpertsLowering:
        """The rewrite of one node."""
        return _Contrib(node, self.recipe, self.calibration)


class _Contrib(ExpertsLowering):
    def __init__(self, node: ir.Node, recipe: Recipe, calibration: CalibrationFile | None) -> None:
        super().__init__(node)
        layout = recipe.layout_of(*origin_of(self.gate_up).names)
        is_small = isinstance(layout, BlockFormat) and layout.bits == 4
        self.layout: BlockFormat | ChannelFormat | None = _BLOCKS if is_small else None if layout is None else _CHANNELS
        self.calibration = calibration

    def build(self, build: Builder) -> ir.Value:
        logits_Tk, expert_Tk = self.choose(build)
        rows_AD = self.scaled(build, build("Sigmoid", logits_Tk))
        expert_A = build("Reshape", expert_Tk, build.constant([-1]))
        if self.is_range:
            rows_AD = build("Mul", rows_AD, build("Gather", self._own(), expert_A, axis=0))
        choices_AE = build("Gather", self._choices(), expert_A, axis=0)
        downs = [expert_of(self.down, expert) for expert in range(self.experts)]
        y_AD: ir.Value
        if self.layout is None:
            fc1, fc2 = build.weight("gate_up", Stacked(self._gate_ups())), build.weight("down", Stacked(downs))
            y_AD = build("MoE", rows_AD, choices_AE, fc1, None, fc2, domain=CONTRIB, **_ATTRIBUTES)
        else:
            stored = [*self._coded(build, "gate_up", self._gate_ups()), None, *self._coded(build, "down", downs)]
            y_AD = build("QMoE", rows_AD, choices_AE, *stored, domain=CONTRIB, **_ATTRIBUTES, **self._bits())
        return self.summed(build, y_AD)

    def _choices(self) -> ir.Value:
        """[N, E], of N experts of all ranks: row n chooses the n-th, or the first one if another rank has that."""
        chosen_N = np.where(self._is_own(), np.arange(len(self._is_own())) - self.first, 0)
        table_NE = np.where(chosen_N[:, None] == np.arange(self.experts), 0, _NOT_CHOSEN)
        return self._shared("choices", table_NE)

    def _own(self) -> ir.Value:
        """[N, 1]: 0 for experts of other ranks, whose rows are nothing here."""
        return self._shared("own", self._is_own()[:, None])

    def _is_own(self) -> np.ndarray[Any, Any]:
        """Which of all experts, [N], are those of this rank."""
        count = self.logits_TE.shape[-1] if self.logits_TE.shape is not None and self.is_range else self.experts
        assert isinstance(count, int), "the number of all experts is known"
        return (np.arange(count) >= self.first) & (np.arange(count) < self.first + self.experts)

    def _shared(self, kind: str, table: np.ndarray[Any, Any]) -> ir.Value:
        """A float32 initializer that the layers share."""
        graph, name = self.node.graph, f"experts.{kind}.{'x'.join(map(str, table.shape))}"
        assert isinstance(graph, ir.Graph)
        if name not in graph.initializers:
            tensor = ir.Tensor(table.astype(np.float32), name=name)
            graph.register_initializer(ir.Value(name=name, shape=ir.Shape(table.shape), const_value=tensor,
                                                type=ir.TensorType(ir.DataType.FLOAT)))
        return graph.initializers[name]

    def _gate_ups(self) -> list[Interleaved]:
        """Gate and up of every expert; hidden channels are filled up to whole blocks, which ``down`` reads."""
        multiple = self.layout.block if isinstance(self.layout, BlockFormat) else 1
        return [Interleaved(expert_of(self.gate_up, expert), multiple) for expert in range(self.experts)]

    def _bits(self) -> dict[str, int]:
        if not isinstance(self.layout, BlockFormat):
            return {"expert_weight_bits": 8}
        if self.width % self.layout.block:
            raise HerdError(f"{origin_of(self.gate_up).name} reads {self.width} channels, which is no multiple of "
                            f"{self.layout.block}: store the experts in 8 bits, or in floating point")
        return {"expert_weight_bits": self.layout.bits, "block_size": self.layout.block}

    def _coded(self, build: Builder, name: str, sources: Sequence[ir.TensorProtocol]) -> tuple[ir.Value, ir.Value]:
        """Codes first: writing them finds the scales."""
        stacked = StackedCodes([self._codes(source) for source in sources])
        return build.weight(f"{name}.codes", stacked), build.weight(f"{name}.scales", StackedScales(stacked))

    def _codes(self, source: ir.TensorProtocol) -> Any:
        assert self.layout is not None, "floats have no codes"
        hessian = hessian_of(source, self.layout, self.calibration)
        if isinstance(self.layout, BlockFormat):
            return BlockCodes(source, self.layout, hessian)
        return ChannelCodes(source, hessian, centered=True)
