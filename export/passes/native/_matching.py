"""Finding the parts of a layer that one of our own operators computes at once."""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir


class Norm(NamedTuple):
    """An RMS norm with a gain, or a layer norm with a gain and a shift.

    Attributes:
        x: what is normed.
        gain: [D].
        epsilon: added to the mean square.
        shift: [D], of a layer norm.
    """

    x: ir.Value
    gain: ir.Value
    epsilon: float
    shift: ir.Value | None = None


class SwiGlu(NamedTuple):
    """down(silu(gate(x)) * up(x)).

    Attributes:
        x: its input.
        weights: gate [D, F], up [D, F] and down [F, D].
        down: the last node.
    """

    x: ir.Value
    weights: tuple[ir.Value, ir.Value, ir.Value]
    down: ir.Node


def made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that makes a value, if it is of a type."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None


def weight_of(node: ir.Node | None) -> ir.Value | None:
    """The stored matrix [K, N] of a ``MatMul``."""
    weight = node.inputs[1] if node is not None and node.op_type == "MatMul" else None
    known = weight is not None and weight.is_initializer() and weight.const_value is not None
    return weight if known and weight is not None and len(weight.const_value.shape) == 2 else None  # type: ignore[union-attr]


def norm_of(value: ir.Value | None) -> Norm | None:
    """The norm whose result a value is, reshaped or not."""
    reshape = made_by(value, "Reshape")
    node = made_by(reshape.inputs[0] if reshape is not None else value, "RMSNormalization")
    if node is None:
        return None
    x, gain = node.inputs[:2]
    if x is None or gain is None or not gain.is_initializer():
        return None
    return Norm(x, gain, node.attributes["epsilon"].as_float())


def layer_norm_of(value: ir.Value | None) -> Norm | None:
    """The layer norm whose result a value is."""
    node = made_by(value, "LayerNormalization")
    if node is None or len(node.inputs) != 3 or len(node.outputs) != 1:
        return None
    x, gain, shift = node.inputs
    stored = gain is not None and shift is not None and gain.is_initializer() and shift.is_initializer()
    over_width = node.attributes.get_int("axis", -1) == -1 and gain is not None and len(gain.shape or ()) == 1
    if x is None or gain is None or not stored or not over_width:
        return None
    return Norm(x, gain, node.attributes.get_float("epsilon", 1e-5), shift)


def addition_of(value: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """The two parts of a sum whose second one is a bias, a vector of the last axis."""
    add = made_by(value, "Add")
    if add is None:
        return None
    for bias, other in (add.inputs, add.inputs[::-1]):
        if bias is not None and other is not None and bias.shape is not None and len(bias.shape) == 1:
            return other, bias
    return None


def only_user(value: ir.Value, op_type: str) -> ir.Node | None:
    """The one node that reads a value, if it is of a type and the value does not leave the graph."""
    uses = list(value.uses())
    alone = len(uses) == 1 and not value.is_graph_output() and uses[0][0].op_type == op_type
    return uses[0][0] if alone else None


def other_input(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """What a node of two inputs reads beside a value."""
    first, second = node.inputs
    return second if first is value else first


def swiglu_of(down: ir.Node) -> SwiGlu | None:
    """The SwiGLU block that ends in a ``MatMul``, None where it ends none."""
    product = made_by(down.inputs[0], "Mul") if weight_of(down) else None
    if product is None:
        return None
    for silu_value, up_value in (product.inputs, product.inputs[::-1]):
        silu, up = made_by(silu_value, "Mul"), made_by(up_value, "MatMul")
        sigmoid = next((node for value in silu.inputs if (node := made_by(value, "Sigmoid"))), None) if silu else None
        gate = made_by(sigmoid.inputs[0], "MatMul") if sigmoid else None
        weights = (weight_of(gate), weight_of(up), weight_of(down))
        if gate is not None and up is not None and gate.inputs[0] is up.inputs[0] and all(weights):
            return SwiGlu(gate.inputs[0], weights, down)  # type: ignore[arg-type]
    return None
