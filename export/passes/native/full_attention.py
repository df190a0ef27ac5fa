"""Attention of every token to all others as our own ``FullAttention``, as the layers of the image tower have it.

    y = Attention(rotate(x Wq + bq), rotate(x Wk + bk), x Wv + bv)

The products are one by then (``join_matmuls.py``), and the biases become one here, so that a later pass finds them
behind one product.
"""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, common

from ...graph.builder import Builder
from ..report import report
from ._matching import addition_of, made_by, only_user
from ._weights import DOMAIN, take_place


class Heads(NamedTuple):
    """Queries, keys or values before they are rotated.

    Attributes:
        part: a part of the joined product.
        bias: [H d], added to it.
        rotation: cosines and sines [T, d / 2], absent of values.
    """

    part: ir.Value
    bias: ir.Value
    rotation: tuple[ir.Value, ...]


class Found(NamedTuple):
    """One attention.

    Attributes:
        joined: queries, keys and values side by side, without their biases.
        qkv: the three.
        num_heads: H.
        end: the node that puts heads side by side again.
    """

    joined: ir.Value
    qkv: list[Heads]
    num_heads: int
    end: ir.Node


class LowerFullAttention(InPlacePass):
    """Replace ``Attention`` without a mask, and what turns products into its inputs; runs after ``JoinMatMuls``."""

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the main graph."""
        nodes = [node for node in model.graph if node.op_type == "Attention"]
        found = [(node, layer) for node in nodes if (layer := _found(node))]
        for node, layer in found:
            _replace(model.graph, str(node.name), layer)
        if found:
            model.opset_imports[DOMAIN] = 1
            common.RemoveUnusedNodesPass()(model)
        taken = {node for node, _ in found}
        declined = [(node, "its inputs are not one product of biases and rotations") for node in nodes
                    if node not in taken]
        return report(self, model, [node for node, _ in found], declined)


def _replace(graph: ir.Graph, name: str, layer: Found) -> None:
    build = Builder(f"{name}/full")
    biases = [heads.bias for heads in layer.qkv]
    bias = build("Concat", *biases, axis=0)
    bias.shape = ir.Shape([sum(int(each.shape.numpy()[0]) for each in biases if each.shape is not None)])
    bias.type = ir.TensorType(ir.DataType.FLOAT)
    y = build("FullAttention", build("Add", layer.joined, bias), *layer.qkv[0].rotation, domain=DOMAIN,
              num_heads=layer.num_heads)
    y.shape, y.type = layer.end.outputs[0].shape, layer.end.outputs[0].type
    take_place(graph, layer.end, build, y)


def _found(node: ir.Node) -> Found | None:
    """The attention that a node is part of, None where it is another one."""
    qkv = [heads for value in node.inputs if (heads := _heads(value))]
    turned = only_user(node.outputs[0], "Transpose")
    end = only_user(turned.outputs[0], "Reshape") if turned is not None and _swaps_heads(turned) else None
    if len(node.inputs) != 3 or len(qkv) != 3 or end is None or not _is_plain(node):
        return None
    split = made_by(qkv[0].part, "Split")
    alike = qkv[0].rotation == qkv[1].rotation and not qkv[2].rotation
    if split is None or list(split.outputs) != [heads.part for heads in qkv] or not alike:
        return None
    query, joined = node.inputs[0], split.inputs[0]
    count = query.shape[1] if query is not None and query.shape is not None else None
    return Found(joined, qkv, count, end) if joined is not None and isinstance(count, int) else None


def _is_plain(node: ir.Node) -> bool:
    """Whether scores are neither masked nor capped, and scaled as they always are."""
    given = {name: attribute.value for name, attribute in node.attributes.items()}
    return not given.get("is_causal") and not given.get("softcap") and "scale" not in given


def _swaps_heads(transpose: ir.Node) -> bool:
    """Whether it makes [B, H, T, d] of [B, T, H, d], or the other way round."""
    return list(transpose.attributes.get_ints("perm", ())) == [0, 2, 1, 3]


def _heads(value: ir.Value | None) -> Heads | None:
    """What became one of attention's inputs [B, H, T, d]."""
    turned = made_by(value, "Transpose")
    apart = made_by(turned.inputs[0], "Reshape") if turned is not None and _swaps_heads(turned) else None
    if apart is None:
        return None
    rotated = made_by(apart.inputs[0], "RotaryEmbedding")
    rotation = _rotation(rotated) if rotated is not None else ()
    added = addition_of(rotated.inputs[0] if rotated is not None else apart.inputs[0])
    return Heads(*added, rotation) if added is not None and rotation is not None else None


def _rotation(node: ir.Node) -> tuple[ir.Value, ...] | None:
    """Cosines and sines of pairs, the same for every row of tokens."""
    expanded = [made_by(value, "Expand") for value in node.inputs[1:3]]
    tables = tuple(each.inputs[0] for each in expanded if each is not None)
    pairs = node.attributes.get_int("interleaved", 0) == 1
    known = [table for table in tables if table is not None and table.shape is not None and len(table.shape) == 2]
    return tuple(known) if pairs and len(known) == 2 else None
