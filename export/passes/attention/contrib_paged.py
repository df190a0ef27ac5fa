"""Our ``PagedAttention`` as ONNX Runtime's operator of that name, which has kernels for CUDA only.

Layers of one kind, those that see their whole past (``global``) and those that attend in chunks (``chunked``), share
three inputs of the decoder. A chunk is a sequence of its own, whose past begins anew at every multiple of the chunk:
there is no mask and no window, and blocks of a chunk that is over can be given away. Beside what ``PackTokens`` says of
``input_ids``, ``image_features``, ``positions``, ``cumulative_lengths`` and ``logit_rows``, a decoder takes, for every
kind of which it has layers:

================================  ==============================  =====================================================
decoder input                     shape                           meaning
================================  ==============================  =====================================================
``past_lengths.global``           int32 [sequences]               tokens that each sequence already holds
``past_lengths.chunked``          int32 [sequences]               of them, those of its current chunk: length % chunk
``block_table.{kind}``            int32 [sequences, blocks]       blocks of the past and of the new tokens, in order;
                                                                  ``chunked``: those of the current chunk only. Rows
                                                                  are filled up with 0
``attention_metadata.{kind}``     int32 [2], on the CPU           at least the most new tokens of a sequence, and at
                                                                  least the most of past and new tokens together. They
                                                                  choose kernels and grids, never results
``past.{i}.key|value``            [blocks, tokens of a block, G,  keys and values of layer i, changed in place: bind
                                  K]                              ``present.{i}.key|value`` to the same memory
================================  ==============================  =====================================================

``past_lengths`` of ``PackTokens`` is gone. Outputs are ``logits`` float32 [rows, vocabulary], ``best`` int64 [rows]
(``best_token.py``), and ``present.{i}.key|value``. Blocks are of any size that the kernels have, the same for all
layers of a kind. Caches are bfloat16, int8 or float8e4m3fn; the latter two with a scale per layer from a calibration.
No call may cross a multiple of the chunk in any sequence. Lengths are sums and remainders of small integers: nothing of
them is computed in the graph.

Rotation depends on the distance of two tokens alone, and no chunked layer looks out of its chunk. So these layers
rotate by the position in the chunk, and their tables of cosines and sines have as many rows as a chunk has tokens,
whatever the context. Layers that rotate and see their whole past keep the rotation before the operator. The operator
norms heads before it rotates them and Llama 4 afterwards: a rotation keeps the length of a head and the norm has no
gain, so both are the same.

Shapes: T tokens, H query heads, G key and value heads, K width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, common

from ....model.quantization.calibration_file import CalibrationFile
from ....model.quantization.e4m3 import input_scale
from ....model.quantization.recipes import Caches
from ...graph.builder import CONTRIB, Builder
from ..native._matching import made_by
from ..native._weights import DOMAIN
from ..quantize._caches import layer_of
from ..quantize.kv_int8 import HEADROOM
from ..report import report

_STORED = {"int8": ir.DataType.INT8, "fp8": ir.DataType.FLOAT8E4M3FN}
"""Types of caches in 8 bits."""
_LENGTHS = "past_lengths"


class LowerPagedContrib(InPlacePass):
    """Turn our ``PagedAttention`` into ``com.microsoft.PagedAttention``, and lengths of chunks into inputs.

    Args:
        caches: how keys and values are stored.
        calibration: the largest magnitudes of keys and values, for caches in 8 bits.
    """

    def __init__(self, caches: Caches, calibration: CalibrationFile | None = None) -> None:
        super().__init__()
        self.caches, self.calibration = caches, calibration

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the main graph and its inputs; runs after ``LowerPagedAttention``."""
        graph = model.graph
        found = [node for node in graph if node.domain == DOMAIN and node.op_type == "PagedAttention"]
        for node in found:
            self._replace(graph, node)
        if found:
            model.opset_imports[CONTRIB] = 1
            lengths = next(value for value in graph.inputs if value.name == _LENGTHS)
            graph.inputs.remove(lengths)
            for tidy in (common.RemoveUnusedNodesPass(), common.RemoveUnusedOpsetsPass()):
                tidy(model)
        return report(self, model, found)

    def _replace(self, graph: ir.Graph, node: ir.Node) -> None:
        layer = _Layer(graph, node)
        past_k, past_v, cumulative, _, table = node.inputs[3:8]
        assert past_k is not None and past_v is not None and table is not None  # noqa: PT018
        scales, quantized = self._scales(layer.build, past_k)
        kind = str(table.name).rpartition(".")[2]
        lengths = _input(graph, f"{_LENGTHS}.{kind}", ["sequences"])
        bounds = _input(graph, f"attention_metadata.{kind}", [2])
        outputs = layer.build(
            "PagedAttention", *layer.qkv, past_k, past_v, cumulative, lengths, table, *layer.tables, None, None,
            *layer.gains, *scales, bounds, outputs=3, domain=CONTRIB, **layer.attributes, **quantized,
        )
        for value in (past_k, past_v, *node.outputs[1:]):
            value.type = ir.TensorType(_STORED.get(self.caches, ir.DataType.FLOAT))
            value.shape = ir.Shape([f"{kind}_pool", "block_tokens", layer.groups, layer.head_dim])
        outputs[0].type, outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
        for weight in layer.build.weights:
            graph.register_initializer(weight)
        ir.convenience.replace_nodes_and_values(graph, node, [node], layer.build.nodes, node.outputs, outputs)

    def _scales(self, build: Builder, past: ir.Value) -> tuple[list[ir.Value | None], dict[str, str]]:
        """What a code of 1 is worth among keys and among values, and the attributes that say so."""
        if self.caches not in _STORED:
            return [None, None], {}
        assert self.calibration is not None, "plan_build refuses such a recipe without calibration"
        amaxes = self.calibration.required_kv_amax(layer_of(past), observer="max")
        scales = [amax * HEADROOM / 127 if self.caches == "int8" else input_scale(amax) for amax in amaxes]
        values: list[ir.Value | None] = [
            build.weight(f"{name}.scale", ir.Tensor(np.asarray([scale], np.float32)))
            for name, scale in zip(("key", "value"), scales, strict=True)]
        return values, {"k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR"}


class _Layer:
    """What the operator is told of a layer.

    Attributes:
        qkv: queries, keys and values side by side, and two absent inputs; or the three.
        tables: cosines and sines by position in the chunk; absent where nothing is left to be rotated.
        gains: ones for queries and keys; absent where heads are not normed.
        attributes: of the operator.
    """

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self.graph, self.build = graph, Builder(f"{node.name}/contrib")
        told: dict[str, Any] = {name: attribute.value for name, attribute in node.attributes.items()}
        self.heads, self.groups, self.chunk = told["num_heads"], told["kv_num_heads"], told["chunk"]
        width = node.outputs[0].shape[1] if node.outputs[0].shape is not None else None
        assert isinstance(width, int), "the width of all heads is known"
        self.head_dim = width // self.heads
        self.attributes = {"num_heads": self.heads, "kv_num_heads": self.groups}
        inputs = [*node.inputs, *[None] * (11 - len(node.inputs))]
        self.qkv: list[ir.Value | None] = inputs[:3]
        self.tables: list[ir.Value | None] = [None, None]
        self.gains: list[ir.Value | None] = [None, None]
        cos, sin, temperature = inputs[8:11]
        if cos is not None and sin is not None:
            self._rotate(_row(cos), _row(sin))
        if temperature is not None:
            self._apply_temperature(temperature)
        if told["norm_epsilon"]:
            self.gains = [self._ones()] * 2
            self.attributes["qk_norm_epsilon"] = told["norm_epsilon"]

    def _apart(self) -> list[ir.Value]:
        """Queries, keys and values as three."""
        parts = [value for value in self.qkv if value is not None]
        if len(parts) == 3:
            return parts
        widths = [count * self.head_dim for count in (self.heads, self.groups, self.groups)]
        split = list(self.build("Split", parts[0], self.build.constant(widths), outputs=3, axis=-1))
        for part, width in zip(split, widths, strict=True):
            part.type, part.shape = parts[0].type, ir.Shape(["tokens", width])
        return split

    def _apply_temperature(self, temperature_T: ir.Value) -> None:
        q, k, v = self._apart()
        column = self.build("Unsqueeze", temperature_T, self.build.constant([1]))
        self.qkv = [self.build("Mul", q, column), k, v]

    def _rotate(self, *rotation: ir.Value) -> None:
        if self.chunk:
            self.tables = [self._table(value) for value in rotation]
            self.attributes |= {"do_rotary": 1, "rotary_interleaved": 1}
            return
        q, k, v = self._apart()
        self.qkv = [self._rotated(q, rotation, self.heads), self._rotated(k, rotation, self.groups), v]

    def _rotated(self, x: ir.Value, rotation: tuple[ir.Value, ...], heads: int) -> ir.Value:
        first = self.build.constant([0])
        row = self.build("Unsqueeze", x, first)
        row = self.build("RotaryEmbedding", row, *rotation, interleaved=1, num_heads=heads)
        rotated: ir.Value = self.build("Squeeze", row, first)
        return rotated

    def _table(self, rotation: ir.Value) -> ir.Value:
        """Cosines or sines [chunk, K / 2] of every position in a chunk; layers share them."""
        maker = rotation.producer()
        angles = made_by(maker.inputs[0], "Mul") if maker is not None else None
        assert maker is not None and angles is not None, "a rotation is cosines and sines of position · frequency"  # noqa: PT018
        function = {"Cos": np.cos, "Sin": np.sin}[maker.op_type]
        [frequencies_h] = [tensor.numpy() for value in angles.inputs if (tensor := _constant(value)) is not None]
        angle_Ch = np.arange(self.chunk, dtype=np.float32)[:, None] * frequencies_h.reshape(-1)
        return self._shared(f"rotation.{maker.op_type.lower()}", function(angle_Ch))

    def _ones(self) -> ir.Value:
        return self._shared("ones", np.ones(self.head_dim, np.float32))

    def _shared(self, name: str, values: np.ndarray[Any, Any]) -> ir.Value:
        """An initializer that is made once for all layers."""
        name = f"attention.{name}.{'x'.join(map(str, values.shape))}"
        if name not in self.graph.initializers:
            tensor = ir.Tensor(values, name=name)
            self.graph.register_initializer(ir.Value(
                name=name, shape=ir.Shape(values.shape), type=ir.TensorType(tensor.dtype), const_value=tensor))
        return self.graph.initializers[name]


def _row(rows: ir.Value) -> ir.Value:
    """The row that a list was taken out of."""
    squeeze = made_by(rows, "Squeeze")
    row = squeeze.inputs[0] if squeeze is not None else None
    assert row is not None, "our operator reads a row's tables as a list"
    return row


def _constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """What a value holds, if that is known."""
    if value is None or value.is_initializer():
        return value.const_value if value is not None else None
    maker = made_by(value, "Constant")
    return maker.attributes["value"].as_tensor() if maker is not None else None


def _input(graph: ir.Graph, name: str, dims: Sequence[str | int]) -> ir.Value:
    """An int32 input of the graph, which is made once."""
    found = next((value for value in graph.inputs if value.name == name), None)
    if found is None:
        found = ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(ir.DataType.INT32))
        graph.inputs.append(found)
    return found
