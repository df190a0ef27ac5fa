"""Feed-forward layers as our own ``Mixture``: norm, router, shared and routed experts, and residual in one operator.

    y = [x +] shared(n) + sum over the chosen e of expert_e(sigmoid(l_e) n),     n = norm(x),  l = router n

A dense layer is a mixture without experts. The residual is added inside unless ranks have to add their parts first.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, common

from ....model.checkpoint.rotated import power_of_two_in
from ....model.llama4.operators import DOMAIN as HERDGRAPH
from ....model.quantization.calibration_file import CalibrationFile
from ....model.quantization.recipes import Recipe
from ...graph.builder import Builder
from ...weights.packed import GateUp, format_number
from ...weights.stream import expert_of
from ..quantize.rotate_hidden import LARGEST_BLOCK, SMALLEST_BLOCK, BlockRotated
from ..report import report
from ._matching import Norm, SwiGlu, norm_of, only_user, other_input, swiglu_of, weight_of
from ._weights import DOMAIN, Packer, take_place


class FeedForward(NamedTuple):
    """A feed-forward layer.

    Attributes:
        norm: before it.
        shared: the shared expert, or all of a dense layer; None where only experts are.
        experts: the ``RoutedExperts``, None in a dense layer.
        end: its last node, before the residual is added.
    """

    norm: Norm
    shared: SwiGlu | None
    experts: ir.Node | None
    end: ir.Node


class LowerMixtures(InPlacePass):
    """Replace every feed-forward layer whose weights our operators can store.

    Args:
        recipe: says which weight is stored how.
        calibration: Hessians of inputs.
    """

    def __init__(self, recipe: Recipe, calibration: CalibrationFile | None = None) -> None:
        super().__init__()
        self.packer, self.rotates = Packer(recipe, calibration), recipe.rotated

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the main graph."""
        found = [layer for layer in _layers(model.graph) if self._can_pack(layer)]
        for layer in found:
            _Lowering(self.packer, layer, rotates=self.rotates).replace(model.graph)
        if found:
            model.opset_imports[DOMAIN] = 1
            common.RemoveUnusedNodesPass()(model)
        return report(self, model, [layer.end for layer in found])

    def _can_pack(self, layer: FeedForward) -> bool:
        shared = layer.shared.weights if layer.shared else ()
        weights = [*shared, *(layer.experts.inputs[2:4] if layer.experts else ())]
        return all(weight is not None and weight.const_value is not None and self.packer.can_mix(weight.const_value)
                   for weight in weights)


def _layers(graph: ir.Graph) -> list[FeedForward]:
    """The feed-forward layers of a canonical decoder."""
    blocks = {block.down.outputs[0]: block for node in graph if (block := swiglu_of(node))}
    found, used = [], set()
    for node in graph:
        if node.domain != HERDGRAPH or node.op_type != "RoutedExperts" or not (norm := norm_of(node.inputs[0])):
            continue
        add = only_user(node.outputs[0], "Add")
        shared = blocks.get(other_input(add, node.outputs[0])) if add else None  # type: ignore[arg-type]
        if shared is not None and shared.x is not node.inputs[0]:
            shared = None
        used.add(shared)
        found.append(FeedForward(norm, shared, node, add if shared and add else node))
    dense = [block for block in blocks.values() if block not in used]
    return found + [FeedForward(norm, block, None, block.down) for block in dense if (norm := norm_of(block.x))]


class _Lowering:
    """The rewrite of one layer."""

    def __init__(self, packer: Packer, layer: FeedForward, *, rotates: bool) -> None:
        self.packer, self.layer, self.rotates = packer, layer, rotates
        self.build = Builder(str(layer.end.name))
        self.attributes: dict[str, Any] = {"epsilon": layer.norm.epsilon}

    def replace(self, graph: ir.Graph) -> None:
        """Put the operator in the layer's place."""
        layer, build = self.layer, self.build
        inputs = [*self._experts(), *self._shared()]
        end, has_residual = self._end()
        y = build("Mixture", layer.norm.x, layer.norm.gain, *inputs, domain=DOMAIN, residual=int(has_residual),
                  **self.attributes)
        y.shape, y.type = layer.norm.x.shape, layer.norm.x.type
        if not has_residual and layer.experts is not None:  # a mixture's own nodes see a list of tokens
            width = int(layer.norm.gain.shape.numpy()[0])  # type: ignore[union-attr]
            y = build("Reshape", y, build.constant([-1, width]))
            y.shape, y.type = layer.end.outputs[0].shape, layer.end.outputs[0].type
        take_place(graph, end, build, y)

    def _experts(self) -> list[ir.Value | None]:
        """Router, gate and up, down: inputs 2 to 6."""
        node = self.layer.experts
        if node is None:
            return [None] * 5
        router = weight_of(node.inputs[1].producer() if node.inputs[1] else None)
        gate_up, down = (value.const_value for value in node.inputs[2:4] if value is not None)
        assert router is not None and router.const_value is not None and gate_up is not None and down is not None  # noqa: PT018
        experts, width = (int(count) for count in down.shape.numpy()[:2])
        layouts = self.packer.layout_of(gate_up), self.packer.layout_of(down)
        assert layouts[0] == layouts[1], "a recipe's rules name whole experts"
        first = node.attributes["first_expert"].as_int() if "first_expert" in node.attributes else 0
        self.attributes |= {
            "format": format_number(layouts[0]), "width": width, "experts": experts, "first_expert": first,
            "all_experts": int(router.const_value.shape.numpy()[1]), "top_k": node.attributes["top_k"].as_int(),
        }
        sources = [GateUp(expert_of(gate_up, expert)) for expert in range(experts)]
        downs = [self._rotated(expert_of(down, expert), "hadamard") for expert in range(experts)]
        return [self.packer.matrix(self.build, "router", router.const_value, None)[0],
                *self.packer.experts(self.build, "experts.gate_up_proj", sources, layouts[0]),
                *self.packer.experts(self.build, "experts.down_proj", downs, layouts[1])]

    def _shared(self) -> list[ir.Value | None]:
        """Gate and up, down: inputs 7 to 10."""
        if self.layer.shared is None:
            return [None] * 4
        gate, up, down = (weight.const_value for weight in self.layer.shared.weights)
        assert gate is not None and up is not None and down is not None  # noqa: PT018
        layouts = self.packer.layout_of(gate, up), self.packer.layout_of(down)
        assert layouts[0] == layouts[1], "a recipe's rules name whole feed-forwards"
        self.attributes |= {"shared_format": format_number(layouts[0]), "shared_width": int(down.shape.numpy()[0])}
        prefix = "shared_expert." if self.layer.experts is not None else ""
        down = self._rotated(down, "shared_hadamard")
        return [*self.packer.matrix(self.build, f"{prefix}gate_up_proj", GateUp(gate, up), layouts[0]),
                *self.packer.matrix(self.build, f"{prefix}down_proj", down, layouts[1])]

    def _rotated(self, down: ir.TensorProtocol, attribute: str) -> ir.TensorProtocol:
        """The weight for hidden channels that are rotated before they are quantised (``rotate_hidden.py``)."""
        block = power_of_two_in(int(down.shape.numpy()[0]), LARGEST_BLOCK)
        if not self.rotates or block < SMALLEST_BLOCK:
            return down
        self.attributes[attribute] = block
        return BlockRotated(down, block)

    def _end(self) -> tuple[ir.Node, bool]:
        """The node whose result is the operator's, and whether the residual is in it."""
        last = self.layer.end
        reshape = only_user(last.outputs[0], "Reshape")
        add = only_user((reshape or last).outputs[0], "Add")
        if add is not None and other_input(add, (reshape or last).outputs[0]) is self.layer.norm.x:
            return add, True
        return last, False
