"""Origins: every tensor that is made of a checkpoint's knows of which, whatever the graph calls it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx_ir.passes import InPlacePass

from herdgraph.export.graph.capture import bind_weights
from herdgraph.export.passes import (
    FoldWeightTransposes,
    JoinMatMuls,
    LowerExpertsDense,
    LowerExpertsGathered,
    LowerExpertsUnrolled,
    LowerRoutedExperts,
    QuantizeMatMuls,
    RotateHidden,
)
from herdgraph.export.passes.quantize.rotate_hidden import BlockRotated
from herdgraph.export.weights import writer
from herdgraph.export.weights.origin import Origin, origin_of
from herdgraph.export.weights.rounded import Rounded
from herdgraph.export.weights.stream import Joined, Weight, expert_of, transposed
from herdgraph.export.weights.writer import initializers, stream
from herdgraph.model.quantization.formats import BlockFormat, ChannelFormat
from herdgraph.model.quantization.recipes import Recipe, Rule
from support import graphs

EXPERTS = "layers.0.feed_forward.experts"
SHAPES = {
    "layers.0.self_attn.q_proj.weight": (16, 32), "layers.0.self_attn.k_proj.weight": (8, 32),
    f"{EXPERTS}.gate_up_proj": (3, 32, 32), f"{EXPERTS}.down_proj": (3, 16, 32),
}


class Source:
    def read(self, name: str, index: int | slice | None = None) -> torch.Tensor:
        value = torch.ones(SHAPES[name])
        return value if index is None else value[index]


def layer() -> ir.Model:
    """Two products of one input and three experts, bound to a checkpoint as captured graphs are."""
    model = graphs.parse("""g (float[t, 32] x, float[t, 3] logits, float[16, 32] q, float[8, 32] k,
        float[3, 32, 32] gate_up, float[3, 16, 32] down) => (float[t, 16] u, float[t, 8] v, float[t, 32] y) {
        q_T = Transpose <perm = [1, 0]> (q)
        k_T = Transpose <perm = [1, 0]> (k)
        u = MatMul (x, q_T)
        v = MatMul (x, k_T)
        y = herdgraph.RoutedExperts <top_k = 1> (x, logits, gate_up, down)
    }""", **{name: np.zeros(shape, np.float32) for name, shape in zip(
        ("q", "k", "gate_up", "down"), SHAPES.values(), strict=True)})
    for value, name in zip(list(model.graph.initializers.values()), SHAPES, strict=True):
        value.name, value.const_value = name, None
    bind_weights(model, Source())
    next(node for node in model.graph if node.op_type == "RoutedExperts").name = EXPERTS
    return model


def origins(model: ir.Model) -> set[Origin]:
    return {origin_of(value.const_value) for value in initializers(model) if value.const_value is not None}


QK = Origin(tuple(SHAPES)[:2])
APART = {Origin((f"{EXPERTS}.{role}",), expert) for role in ("gate_up_proj", "down_proj") for expert in range(3)}
TOGETHER = {Origin((f"{EXPERTS}.{role}",)) for role in ("gate_up_proj", "down_proj")}


@pytest.mark.parametrize(("lowering", "experts"), [
    (LowerRoutedExperts, APART), (LowerExpertsUnrolled, APART), (LowerExpertsDense, TOGETHER),
    (LowerExpertsGathered, TOGETHER),
])
@pytest.mark.parametrize("layout", [None, ChannelFormat(), BlockFormat(8, 32), BlockFormat(4, 32)], ids=str)
def test_origins_after_lowering(
    lowering: type[InPlacePass], experts: set[Origin], layout: BlockFormat | ChannelFormat | None, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Folded, joined, taken apart by expert, rotated, quantized and written: codes and scales as well."""
    monkeypatch.setattr(writer, "INLINE_BYTES", 0)
    model = layer()
    for rewrite in (FoldWeightTransposes, JoinMatMuls, lowering, RotateHidden):
        rewrite()(model)
    assert origins(model) == {QK, *experts}
    QuantizeMatMuls(Recipe("test", "", (Rule("*", layout),)))(model)
    assert origins(model) == {QK, *experts}
    stream(model, tmp_path, "data")
    assert origins(model) == {QK, *experts}


def test_origin_of_wrappers() -> None:
    down = Weight(Source(), f"{EXPERTS}.down_proj", (3, 16, 32))
    wanted = Origin((f"{EXPERTS}.down_proj",), 2)
    one = down.of_expert(2)
    assert origin_of(down) == Origin(wanted.names)
    for tensor in (one, one.transposed(), BlockRotated(one, 16), Rounded(one, ir.DataType.BFLOAT16),
                   Rounded(BlockRotated(one, 16), ir.DataType.BFLOAT16)):
        assert origin_of(tensor) == wanted
    assert origin_of(Joined([one, down.of_expert(0)])).names == wanted.names * 2


def test_origin_of_ordinary_tensors_is_their_name() -> None:
    """Whoever makes graphs by hand needs no checkpoint: a tensor is the stored tensor of its name."""
    tensor = ir.Tensor(np.zeros((2, 3, 4), np.float32), name="a")
    assert origin_of(tensor) == Origin(("a",))
    assert origin_of(transposed(expert_of(tensor, 1))) == Origin(("a",), 1)
    value = ir.Value(name="b", const_value=ir.Tensor(np.zeros((2, 3), np.float32), name="b"))
    assert origin_of(Joined([value.const_value, expert_of(tensor, 0)])) == Origin(("b", "a"))
    assert Origin(("b", "a")).name == "b"


def test_origin_survives_a_new_name_in_the_graph() -> None:
    """onnx-ir renames a tensor with its value."""
    value = ir.Value(name="x", const_value=Weight(Source(), "layers.0.self_attn.q_proj.weight", (16, 32)))
    value.name = "y"
    assert value.const_value is not None
    assert value.const_value.name == "y"
    assert origin_of(value.const_value) == Origin(("layers.0.self_attn.q_proj.weight",))
