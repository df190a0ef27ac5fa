"""Llama 4's decoder layer in the operators that are fastest on CUDA, in any size, with any source of weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .attention_sessions import BLOCK
from .formulas import rotary_tables
from .graphs import CONTRIB, Array, Graph
from .operators import SWIGLU

Source = Callable[[Graph, str, list[int], str], str]
"""Makes a weight of a graph: its name, shape and type."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder.

    Attributes:
        width: of the residual stream.
        heads: of queries.
        groups: heads of keys and values.
        head: width of a head.
        expert: width of an expert.
        experts: routed ones; one more is shared.
    """

    width: int
    heads: int
    groups: int
    head: int
    expert: int
    experts: int

    def bytes_per_token(self, experts: str) -> float:
        """Bytes of weights that a layer reads for one token: one routed expert, the shared one, attention."""
        attention = self.width * self.head * (2 * self.heads + 2 * self.groups)
        feed_forward = 2 * 3 * self.width * self.expert
        if experts == "bf16":
            return 2.0 * (attention + feed_forward)
        return (1 + 2 / 32) * attention + (0.5 + 2 / 32) * feed_forward

    def bytes_in_all(self, experts: str) -> float:
        """Bytes of a layer's weights."""
        others = (self.experts - 1) * 3 * self.width * self.expert
        return self.bytes_per_token(experts) + others * (2.0 if experts == "bf16" else 0.5 + 2 / 32)


SCOUT = Shape(5120, 40, 8, 128, 8192, 16)
SMALL = Shape(320, 10, 2, 128, 512, 16)
"""Scout's divided by 16."""


class Decoder:
    """Layers one after another over packed tokens: inputs x [n, D], cum, past, table, bounds, and caches per layer.

    Args:
        shape: sizes.
        experts: ``bf16``, or ``int4`` for 4-bit feed-forwards and 8-bit attention.
        source: of the weights.
        cache: type of keys and values.
        positions: of the rotary tables.
    """

    def __init__(
        self, shape: Shape, experts: str, source: Source, *, cache: str = "bf16", positions: int = 16384
    ) -> None:
        self.shape, self.experts, self.source, self.cache = shape, experts, source, cache
        self.graph = graph = Graph("bf16")
        graph.input("x", "fp32", ["n", shape.width])
        for name, dims in (("cum", ["b1"]), ("past", ["b"]), ("table", ["b", "w"]), ("bounds", [2])):
            graph.input(name, "int32", dims)  # type: ignore[arg-type]
        cos, sin = rotary_tables(positions, shape.head)
        graph.weight("cos", cos)
        graph.weight("sin", sin)
        graph.weight("one", np.ones(shape.head))
        graph.weight("gain", np.ones(shape.width))
        graph.weight("zero", np.array(0))
        graph.weight("low", np.array(-1e4))
        graph.weight("first", np.array([1]), "int64")
        graph.weight("ids", np.arange(shape.experts)[None], "int64")

    def build(self, layers: int, vocabulary: int = 0) -> bytes:
        """The model; its result y is [n, D], or the logits of all tokens."""
        graph = self.graph
        stream, added = graph.cast("x", "bf16"), graph.weight("nothing", np.zeros((1, 1)))
        stream = graph.add("Add", stream, added)  # what a layer adds to is a value of its own
        hidden = graph.add("Mul", stream, "zero")
        for layer in range(layers):
            hidden, stream = self._layer(str(layer), hidden, stream)
        y, *_ = self._norm(hidden, stream)
        if vocabulary:
            y = graph.add("MatMul", y, self.source(graph, "head", [self.shape.width, vocabulary], "bf16"))
        graph.output(y, "y", ["n", vocabulary or self.shape.width])
        return graph.model()

    def _norm(self, x: str, stream: str) -> tuple[str, str]:
        """The stream with x added, normed and as it is."""
        normed, _, _, total = self.graph.add("SkipSimplifiedLayerNormalization", x, stream, "gain", domain=CONTRIB,
                                             outputs=(f"{x}.normed", "", "", f"{x}.sum"), epsilon=1e-5)
        return normed, total

    def _layer(self, name: str, x: str, stream: str) -> tuple[str, str]:
        """A layer's contribution, and the stream that it is added to."""
        normed, stream = self._norm(x, stream)
        normed, stream = self._norm(self._attention(name, normed), stream)
        return self._feed_forward(name, normed), stream

    def _attention(self, name: str, x: str) -> str:
        graph, shape = self.graph, self.shape
        dims: list[int | str] = ["blocks", BLOCK, shape.groups, shape.head]
        caches = [graph.input(f"past.{name}.{part}", self.cache, dims) for part in "kv"]
        qkv = self._product(f"{name}.qkv", x, shape.width, (shape.heads + 2 * shape.groups) * shape.head, 8)
        attended, *now = graph.add(
            "PagedAttention", qkv, "", "", *caches, "cum", "past", "table", "cos", "sin", "", "", "one", "one", "", "",
            "bounds", outputs=(f"{name}.attended", f"now.{name}.k", f"now.{name}.v"), domain=CONTRIB,
            num_heads=shape.heads, kv_num_heads=shape.groups, do_rotary=1, rotary_interleaved=1, qk_norm_epsilon=1e-5)
        for value in now:
            graph.output(value, value, dims, self.cache)
        return self._product(f"{name}.o", attended, shape.heads * shape.head, shape.width, 8)

    def _feed_forward(self, name: str, x: str) -> str:
        """Routed experts, of an input that their score multiplies, and the shared expert."""
        graph, shape = self.graph, self.shape
        router = self.source(graph, f"{name}.router", [shape.width, shape.experts], "fp32")
        top, chosen = graph.add("TopK", graph.add("MatMul", graph.cast(x, "fp32"), router), "first", outputs=2)
        scaled = graph.add("Mul", x, graph.cast(graph.add("Sigmoid", top), "bf16"))
        logits = graph.add("Where", graph.add("Equal", chosen, "ids"), "zero", "low")
        return str(graph.add("Add", self._routed(name, scaled, logits), self._shared(name, x)))

    def _routed(self, name: str, x: str, logits: str) -> str:
        graph, shape = self.graph, self.shape
        sizes = (("gate_up", 2 * shape.expert, shape.width), ("down", shape.width, shape.expert))
        if self.experts == "bf16":
            up, down = (self.source(graph, f"{name}.{part}", [shape.experts, rows, columns], "bf16")
                        for part, rows, columns in sizes)
            return str(graph.add("MoE", x, logits, up, "", down, domain=CONTRIB, **SWIGLU))
        packed = [[self.source(graph, f"{name}.{part}", [shape.experts, rows, columns // 2], "uint8"),
                   self.source(graph, f"{name}.{part}.scales", [shape.experts, rows, columns // 32], "bf16")]
                  for part, rows, columns in sizes]
        return str(graph.add("QMoE", x, logits, *packed[0], "", *packed[1], domain=CONTRIB, expert_weight_bits=4,
                             block_size=32, weights_prepacked=0, **SWIGLU))

    def _shared(self, name: str, x: str) -> str:
        graph, shape = self.graph, self.shape
        both = self._product(f"{name}.shared.gate_up", x, shape.width, 2 * shape.expert, 4)
        gate, up = graph.add("Split", both, outputs=2, axis=-1, num_outputs=2)
        gated = graph.add("Mul", graph.add("QuickGelu", gate, domain=CONTRIB, alpha=1.0), up)
        return self._product(f"{name}.shared.down", gated, shape.expert, shape.width, 4)

    def _product(self, name: str, x: str, inputs: int, outputs: int, bits: int) -> str:
        """A product with a weight: in bfloat16, or in blocks of 32."""
        graph = self.graph
        if self.experts == "bf16":
            return str(graph.add("MatMul", x, self.source(graph, name, [inputs, outputs], "bf16")))
        codes = self.source(graph, name, [outputs, inputs // 32, 4 * bits], "uint8")
        scales = self.source(graph, f"{name}.scales", [outputs, inputs // 32], "bf16")
        return str(graph.add("MatMulNBits", x, codes, scales, domain=CONTRIB, K=inputs, N=outputs, bits=bits,
                             block_size=32))


def random_weights(seed: int = 0) -> Source:
    """Weights in the model itself, which stay so small that nothing overflows; for small shapes."""
    generator = np.random.default_rng(seed)

    def make(graph: Graph, name: str, shape: list[int], kind: str) -> str:
        return graph.weight(name, filling(generator, shape, name, kind), kind)

    return make


def filling(generator: np.random.Generator, shape: list[int], name: str, kind: str) -> Array:
    """Random numbers that suit a weight of a name and a type."""
    if kind == "uint8":
        return generator.integers(0, 256, shape, np.uint8)
    values = generator.standard_normal(shape, np.float32) / np.sqrt(np.float32(shape[-2] if len(shape) > 1 else 1))
    return np.abs(values) * np.float32(0.05) + np.float32(0.001) if name.endswith(".scales") else values


def tables(batch: int, tokens: int) -> dict[str, Array]:
    """Block tables for sequences of up to so many tokens, each with blocks of its own, and the bounds that follow."""
    width = -(-tokens // BLOCK)
    return {"table": np.arange(batch * width, dtype=np.int32).reshape(batch, width),
            "bounds": np.array([1, width * BLOCK], np.int32)}
