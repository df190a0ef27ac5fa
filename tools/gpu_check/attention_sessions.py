"""Sessions of one attention operator with its caches: over blocks, or in one buffer for each sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .check import Place
from .formulas import rotary_tables
from .graphs import CONTRIB, Graph
from .session import Session

BLOCK = 128
"""Tokens of a block of keys and values."""
POSITIONS = 512
"""Of the rotary tables."""
_SCALE = 0.04
"""Of 8-bit keys and values, which are of order one here."""


@dataclass(frozen=True)
class Heads:
    """Sizes of attention.

    Attributes:
        queries: heads of queries.
        groups: heads of keys and values.
        width: of a head.
    """

    queries: int
    groups: int
    width: int

    @property
    def packed(self) -> int:
        """Width of queries, keys and values side by side."""
        return (self.queries + 2 * self.groups) * self.width


def paged(place: Place, heads: Heads, kind: str, cache: str, blocks: int, *, prologue: bool) -> Session:
    """Takes qkv [n, packed], cum, past, table and bounds; gives y [n, queries * width].

    Args:
        place: says on which device.
        heads: sizes.
        kind: type of queries and results.
        cache: type of keys and values.
        blocks: that there are.
        prologue: norm and rotate queries and keys inside, as a layer of Llama 4 wants.
    """
    graph = Graph(kind)
    qkv, dims = graph.activation("qkv", ["n", heads.packed]), [blocks, BLOCK, heads.groups, heads.width]
    caches = [graph.input(f"past.{part}", cache, list(dims)) for part in "kv"]
    shapes: dict[str, list[int | str]] = {"cum": ["b1"], "past": ["b"], "table": ["b", "w"]}
    places = [graph.input(name, "int32", shape) for name, shape in shapes.items()]
    tables, norms, attributes = _prologue(graph, heads) if prologue else (["", ""], ["", ""], {})
    scales, more = _scales(graph, cache)
    y, *_ = graph.add("PagedAttention", qkv, "", "", *caches, *places, *tables, "", "", *norms, *scales,
                      graph.input("bounds", "int32", [2]), outputs=("y0", "now.k", "now.v"), domain=CONTRIB,
                      num_heads=heads.queries, kv_num_heads=heads.groups, **attributes, **more)
    graph.output(y, "y", ["n", heads.queries * heads.width])
    return _with_caches(graph, place, dims, cache)


def grouped(place: Place, heads: Heads, kind: str, cache: str, batch: int, slots: int) -> Session:
    """Takes q, k and v [batch, s, heads * width], last [batch] and total [1]; gives y, likewise."""
    graph, dims = Graph(kind), [batch, heads.groups, slots, heads.width]
    sizes = (("q", heads.queries), ("k", heads.groups), ("v", heads.groups))
    parts = [graph.activation(name, [batch, "s", count * heads.width]) for name, count in sizes]
    past = [graph.input(f"past.{part}", cache, list(dims)) for part in "kv"]
    lengths = graph.input("last", "int32", [batch]), graph.input("total", "int32", [1])
    scales, attributes = _scales(graph, cache)
    unused = [""] * 5 + scales if attributes else []  # tables, positions, bias, sink
    bits = {"kv_cache_bit_width": 8} if attributes else {}
    y, *_ = graph.add("GroupQueryAttention", *parts, *past, *lengths, *unused, outputs=("y0", "now.k", "now.v"),
                      domain=CONTRIB, num_heads=heads.queries, kv_num_heads=heads.groups, **attributes, **bits)
    graph.output(y, "y", [batch, "s", heads.queries * heads.width])
    return _with_caches(graph, place, dims, cache, {"sdpa_kernel": "1"})  # Flash; cuDNN would take over where it is


def _prologue(graph: Graph, heads: Heads) -> tuple[list[str], list[str], dict[str, Any]]:
    """Rotary tables, norms without weights, and what the operator is told of them."""
    cos, sin = rotary_tables(POSITIONS, heads.width)
    ones = [graph.weight(f"one.{part}", np.ones(heads.width)) for part in "qk"]
    return ([graph.weight("cos", cos), graph.weight("sin", sin)], ones,
            {"do_rotary": 1, "rotary_interleaved": 1, "qk_norm_epsilon": 1e-5})


def _scales(graph: Graph, cache: str) -> tuple[list[str], dict[str, Any]]:
    """Scales of 8-bit caches, and what an operator is told of them."""
    if cache not in ("int8", "fp8"):
        return ["", ""], {}
    scales = [graph.weight(f"scale.{part}", np.array([_SCALE]), "fp32") for part in "kv"]
    return scales, {"k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR"}


def _with_caches(
    graph: Graph, place: Place, dims: list[int], cache: str, provider: dict[str, str] | None = None
) -> Session:
    """The session, whose caches are read and written in place."""
    for part in "kv":
        graph.output(f"now.{part}", f"now.{part}", list(dims), cache)
    session = Session(graph.model(), place, provider=provider if place.device != "cpu" else None)
    for part in "kv":
        session.cache(f"past.{part}", f"now.{part}", dims, cache)
    return session
