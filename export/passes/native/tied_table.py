"""A table that is also the head's weights, packed once: ``Project`` multiplies by it, ``Lookup`` reads its rows.

    x = Lookup(ids, E)        logits = E n                        n: what the last norm gives
                              logits = E' M n                     in the rotated basis, M = R^T diag(g) R

Rotated, head and table differ by the weight g of the last norm (``model/checkpoint/rotated.py``). M [D, D] takes its
place, in float32: a hundredth of the table that need not be stored a second time.

By a calibration the table is rounded so that the logits suffer least, by GPTQ with the Hessian of what it is multiplied
with. Its rows are then 1.4 times as far off as those of nearest codes, which is little beside what logits gain: by
the measure of ``export/allocation.py`` SmolLM2's lose 8e-4 nats in 6 bits instead of 6e-3.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, common

from ....model.checkpoint.rotated import RotatedCheckpoint
from ....model.quantization.calibration_file import CalibrationFile
from ....model.quantization.packed_sizes import can_pack
from ....model.quantization.recipes import EMBEDDING, HEAD, Recipe
from ...graph.builder import Builder
from ...weights.origin import Origin, with_origin
from ...weights.packed import PackedMatrix, format_number
from ...weights.stream import Weight
from ..quantize._hessians import hessian_of_tied_head
from ..report import report
from ._matching import norm_of, weight_of
from ._weights import DOMAIN, Packer, take_place


class Tied(NamedTuple):
    """A table of a graph that is both looked up and multiplied with.

    Attributes:
        lookup: the ``Gather`` of its rows.
        table: the whole of it, [V, D].
        head: the ``MatMul`` that gives logits.
        rotated: where the head's weights differ from the table by the last norm's, the checkpoint that says how.
    """

    lookup: ir.Node
    table: Weight
    head: ir.Node
    rotated: RotatedCheckpoint | None


class LowerTiedTable(InPlacePass):
    """Replace lookup and head of a tied table that a graph has both of, whole.

    Args:
        recipe: says how the head is stored; the table is stored so as well.
        calibration: Hessians of inputs; the table is rounded by that of the head.
    """

    def __init__(self, recipe: Recipe, calibration: CalibrationFile | None = None) -> None:
        super().__init__()
        self.layout, self.calibration = recipe.layout_of(HEAD), calibration

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the main graph."""
        tied = _tied(model.graph) if can_pack(self.layout) else None
        if tied is None:
            return report(self, model, [])
        self._replace(model.graph, tied)
        model.opset_imports[DOMAIN] = 1
        common.RemoveUnusedNodesPass()(model)
        return report(self, model, [tied.lookup, tied.head])

    def _replace(self, graph: ir.Graph, tied: Tied) -> None:
        norm = norm_of(tied.head.inputs[0])
        x, gain, epsilon = (norm.x, norm.gain, norm.epsilon) if norm else (tied.head.inputs[0], None, 0.0)
        build, (rows, width) = Builder(str(tied.head.name)), tied.table.shape.numpy()
        stored = self._stored(build, tied.table.transposed())
        form: dict[str, Any] = {"domain": DOMAIN, "format": format_number(self.layout),  # type: ignore[arg-type]
                                "channels": rows}
        if tied.rotated is not None:
            inputs = with_origin(_HeadInputs(tied.rotated), Origin(("norm.weight",)))
            mixing = Packer.stored(build, "inputs", PackedMatrix(inputs, None), None)
            x = build("Project", x, *mixing, gain, None, domain=DOMAIN, format=format_number(None), channels=width,
                      epsilon=epsilon)
            gain, epsilon = None, 0.0
        y = build("Project", x, *stored, gain, None, epsilon=epsilon, **form)
        y.shape, y.type = tied.head.outputs[0].shape, tied.head.outputs[0].type
        take_place(graph, tied.head, build, y)
        look_up = Builder(str(tied.lookup.name))
        found = look_up("Lookup", tied.lookup.inputs[1], *stored, width=width, **form)
        found.shape, found.type = tied.lookup.outputs[0].shape, tied.lookup.outputs[0].type
        take_place(graph, tied.lookup, look_up, found)

    def _stored(self, build: Builder, table_DV: Weight) -> list[ir.Value | None]:
        layout = self.layout
        hessian = None if layout is None else hessian_of_tied_head(layout, self.calibration)  # type: ignore[arg-type]
        return Packer.stored(build, "weight", PackedMatrix(table_DV, layout, hessian), layout)  # type: ignore[arg-type]


class _HeadInputs(ir.LazyTensor):
    """M as a weight [D, D], made while it is written."""

    def __init__(self, source: RotatedCheckpoint) -> None:
        width = source.rotate.width
        super().__init__(lambda: ir.Tensor(source.tied_head_inputs().numpy()), dtype=ir.DataType.FLOAT,
                         shape=ir.Shape((width, width)))


def _tied(graph: ir.Graph) -> Tied | None:
    """The tied table of a graph, if it has one: a rank of several may hold only an end of the model, or some rows."""
    lookups = [node for node in graph if node.op_type == "Gather" and _stored(node.inputs[0]) == EMBEDDING]
    heads = [node for node in graph if _stored(weight_of(node)) in (HEAD, EMBEDDING)]
    if len(lookups) != 1 or len(heads) != 1:
        return None
    table, weight = (_weight(node.inputs[index]) for node, index in ((lookups[0], 0), (heads[0], 1)))
    assert table is not None
    assert weight is not None
    rotated = table.source if weight.stored == HEAD and isinstance(table.source, RotatedCheckpoint) else None
    is_tied = weight.stored == EMBEDDING or (rotated is not None and rotated.ties_head)
    text = table.source.config.text
    whole = table.stored_shape == weight.stored_shape == (text.vocab_size, text.hidden_size)
    return Tied(lookups[0], table, heads[0], rotated) if is_tied and whole else None


def _stored(value: ir.Value | None) -> str:
    """The checkpoint's name of a stored table; empty where it is none."""
    weight = _weight(value)
    return weight.stored if weight is not None else ""


def _weight(value: ir.Value | None) -> Weight | None:
    tensor = value.const_value if value is not None else None
    return tensor if isinstance(tensor, Weight) else None
