"""A float32 graph in bfloat16 (or float16), for runtimes that compute in exactly the types the graph says.

Weights, caches and activations take the 16-bit type. Three kinds of values do not, because a position, a probability
or a sum of squares loses more by rounding than it costs to keep:

    exact     what follows from integers, tables or router logits alone: angles, temperature, the router, its scores;
              and what prepares FP8 products, where it is given as input; float32 from end to end
    between   where exact values meet activations (x · score, q · temperature), norms and rotations, and what chooses
              among activations: float32 inside, the result rounded once
    outside   pixels, image features and logits: float32, because their readers know nothing of this pass

Before this pass the graph runs on a CPU and is the twin of what TensorRT gets: nothing else rounds to 16 bits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from ...weights.rounded import TYPES, Rounded, rounded
from ..report import report

_F32 = ir.DataType.FLOAT
_BETWEEN = {"RMSNormalization", "LayerNormalization", "RotaryEmbedding", "ArgMax"}
_ACTIVATION = {"MatMul", "MatMulNBits", "Gemm", "Attention", "PagedAttention", "QuantizeLinear", "DequantizeLinear",
               "TRT_MoE", "MoE", "QMoE", "SkipSimplifiedLayerNormalization"}
"""Operators whose results are activations, whatever they read."""
_NOT_FLOAT = {"Shape", "Equal", "Less", "LessOrEqual", "QuantizeLinear", "ArgMax"}
_EXACT_INPUTS = {"PagedAttention": (14, 15)}
"""Inputs that stay float32, scales of keys and values, by operator."""
_TYPED_BY = {"Where": 1, "DequantizeLinear": 1}
"""The input whose type an operator's output has, where it is not the first."""


PARAMETERS = (".input_multiplier", ".ratios")
"""Ends of the names of inputs that prepare the operand of an FP8 product, or finish its result."""


class ComputeIn(InPlacePass):
    """Turn a float32 graph into one that computes in a 16-bit type.

    Args:
        dtype: ``BFLOAT16`` or ``FLOAT16``.
        native: norms and rotations whose kernels read and write that type and compute in float32 by themselves.
    """

    def __init__(self, dtype: ir.DataType, native: Collection[str] = ()) -> None:
        super().__init__()
        assert dtype in TYPES, f"{dtype} is not a 16-bit floating-point type"
        self.dtype, self.native = dtype, frozenset(native)

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the main graph and the types of its cache inputs and outputs."""
        nodes = list(model.graph)
        _Rewrite(model.graph, self.dtype, self.native).run()
        return report(self, model, nodes)


class _Rewrite:
    """One graph's rewrite.

    Attributes:
        versions: of every floating-point value, the types it exists in; others are made when a node asks for them.
        exact: values of the first kind above.
    """

    def __init__(self, graph: ir.Graph, dtype: ir.DataType, native: frozenset[str]) -> None:
        self.graph, self.dtype = graph, dtype
        self.activation, self.between = _ACTIVATION | native, _BETWEEN - native
        self.versions: dict[ir.Value, dict[ir.DataType, ir.Value]] = {}
        self.exact: set[ir.Value] = set()

    def run(self) -> None:
        outputs = list(self.graph.outputs)
        for value in self.graph.inputs:
            if value.dtype == _F32:
                self._register(value, self.dtype if _stays_rounded(value) else _F32)
                if str(value.name).endswith(PARAMETERS):
                    self.exact.add(value)
        for value in self.graph.initializers.values():
            if value.dtype == _F32:
                self.versions[value] = {_F32: value}
        for node in list(self.graph):
            self._convert(node)
        for index, value in enumerate(outputs):
            if value in self.versions:  # caches may be codes
                self._hand_out(index, value)
        self._drop_unused()

    def _convert(self, node: ir.Node) -> None:
        assert not any(a.type == ir.AttributeType.GRAPH for a in node.attributes.values()), "subgraphs stay float32"
        made = list(_float_outputs(node, self.versions.keys()))
        floats = [value for value in node.inputs if value in self.versions]
        exact = node.op_type != "Constant" and self._is_exact(node, floats)
        meets = node.op_type not in self.activation and any(value in self.exact for value in floats)
        inside = meets or node.op_type in {*self.between, "Constant"} or _prepares_what_is_quantized(node)
        wanted = _F32 if exact or inside else self.dtype
        kept = _EXACT_INPUTS.get(node.op_type, ())
        for index, value in enumerate(node.inputs):
            if value is not None and value in self.versions:
                node.replace_input_with(index, self._as(value, _F32 if index in kept else wanted, node))
        for output in made:
            self._register(output, wanted)
            if exact:
                self.exact.add(output)

    def _is_exact(self, node: ir.Node, floats: list[ir.Value]) -> bool:
        if node.op_type in self.activation:
            return any("router" in str(value.name).split(".") for value in node.inputs[1:] if value is not None)
        if node.op_type in self.between:
            return False
        varying = [value for value in floats if not _is_constant(value)]
        # A row picked from a constant is an embedding or an expert's weights; any other use of constants is a table.
        return all(value in self.exact for value in varying) and (bool(varying) or node.op_type != "Gather")

    def _register(self, value: ir.Value, dtype: ir.DataType) -> None:
        value.type = ir.TensorType(dtype)
        self.versions[value] = {dtype: value}

    def _as(self, value: ir.Value, dtype: ir.DataType, user: ir.Node | None) -> ir.Value:
        """A value in a type, made before ``user`` (at the end for None) when it is not there yet."""
        versions = self.versions[value]
        if dtype not in versions:
            versions[dtype] = self._made(value, dtype, user)
        return versions[dtype]

    def _made(self, value: ir.Value, dtype: ir.DataType, user: ir.Node | None) -> ir.Value:
        name = f"{value.name}/{dtype.name.lower()}"
        if value.is_initializer():
            assert value.const_value is not None
            stored = Rounded(value.const_value, dtype)
            new = ir.Value(name=name, shape=stored.shape, type=ir.TensorType(dtype), const_value=stored)
            self.graph.register_initializer(new)
            return new
        native = next(iter(self.versions[value].values()))
        producer = value.producer()
        if producer is not None and producer.op_type == "Constant":
            bits = rounded(producer.attributes["value"].as_tensor().numpy(), dtype)
            node = ir.node("Constant", [], {"value": ir.Tensor(bits.view(dtype.numpy()), dtype=dtype)}, name=name)
        else:
            node = ir.node("Cast", [native], {"to": dtype}, name=name)
        node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = name, ir.TensorType(dtype), value.shape
        if user is None:
            self.graph.append(node)
        else:
            self.graph.insert_before(user, node)
        return node.outputs[0]

    def _hand_out(self, index: int, value: ir.Value) -> None:
        """Give a graph output its type, under its own name."""
        name, wanted = str(value.name), self.dtype if _stays_rounded(value) else _F32
        out = self._as(value, wanted, None)
        if out is not value:
            value.name, out.name = f"{name}/{next(iter(self.versions[value])).name.lower()}", name
            self.graph.outputs[index] = out

    def _drop_unused(self) -> None:
        """Remove weights and constants that are read in the other type only, which takes over the name."""
        for value, versions in self.versions.items():
            if not _is_constant(value) or value.uses() or value.is_graph_output():
                continue
            if value.is_initializer():
                name = str(value.name)
                del self.graph.initializers[name]
                if self.dtype in versions:
                    versions[self.dtype].name = name
            else:
                producer = value.producer()
                assert producer is not None
                self.graph.remove(producer, safe=True)


def _stays_rounded(value: ir.Value) -> bool:
    """Caches, and what one pipeline stage hands to the next: only plans and GPUs read them."""
    return str(value.name).startswith(("past.", "new.", "present.", "hidden."))


def _is_constant(value: ir.Value) -> bool:
    producer = value.producer()
    return value.is_initializer() or (producer is not None and producer.op_type == "Constant")


def _prepares_what_is_quantized(node: ir.Node) -> bool:
    """A multiplication by constants right before a ``QuantizeLinear``.

    TensorRT-RTX 1.7 takes factors there for a second scale, and stops at ``quantize_ppg.cpp: CHECK_EQ(scale_opnd ...)``
    when there is one per expert; float32 inside of 16 bits keeps the two apart.
    """
    users = (user for output in node.outputs for user in output.consumers())
    constants = any(_is_constant(value) for value in node.inputs if value is not None)
    return node.op_type == "Mul" and constants and any(user.op_type == "QuantizeLinear" for user in users)


def _float_outputs(node: ir.Node, floats: Collection[ir.Value]) -> Iterator[ir.Value]:
    """Outputs of a float32 node that are floating point; captured and built nodes alike carry no reliable types."""
    if node.op_type == "Constant":
        is_float = "value" in node.attributes and node.attributes["value"].as_tensor().dtype == _F32
    elif node.op_type == "Cast":
        is_float = node.attributes["to"].as_int() == _F32
    elif node.op_type == "ConstantOfShape":
        is_float = "value" not in node.attributes or node.attributes["value"].as_tensor().dtype == _F32
    else:
        typed_by = _TYPED_BY.get(node.op_type, 0)
        is_float = node.op_type not in _NOT_FLOAT and node.inputs[typed_by] in floats
    if is_float:  # of TopK the values, of PagedAttention also caches that are no codes
        first_only = node.op_type == "TopK" or (node.op_type == "PagedAttention" and node.inputs[3] not in floats)
        yield from node.outputs[:1] if first_only else node.outputs
