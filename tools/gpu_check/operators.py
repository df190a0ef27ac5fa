"""Step 1: every operator that a bundle for CUDA may hold against its formula, in Scout's shapes divided by 16."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from .check import Place, Report
from .formulas import attention, error, interleaved, normed, quantized, rotary_tables, rotated, routed_experts
from .graphs import CONTRIB, Array, Graph
from .session import Session

D, F, E, H, G, K = 320, 512, 16, 10, 2, 128
"""Width, width of an expert, experts, heads, heads of keys and values, width of a head."""
SWIGLU = {"k": 1, "normalize_routing_weights": 1, "activation_type": "swiglu", "swiglu_fusion": 1,
          "activation_alpha": 1.0, "activation_beta": 0.0}
LIMITS = {"fp32": 2e-5, "fp16": 1e-3, "bf16": 1e-2}
CACHE_LIMITS = {"int8": 3e-2, "fp8": 8e-2}


def run(place: Place, report: Report) -> None:
    """All of them; one that raises does not end the others."""
    for name, kind, check in _cases(place):
        with report.attempt(name):
            for part, (found, wanted, limit) in enumerate(check(place, kind)):
                report.error(f"{name} {part}" if part else name, error(found, wanted), limit, real=place.real)


def _cases(place: Place) -> Iterator[tuple[str, str, Any]]:
    """Name, type and check."""
    for kind in ("fp32",) if place.device == "cpu" else ("bf16", "fp16"):
        yield f"MoE {kind}", kind, _moe
        yield f"QMoE int4/32 {kind}", kind, partial(_qmoe, bits=4, block=32)
        yield f"QMoE int8/channel {kind}", kind, partial(_qmoe, bits=8, block=-1)
        yield f"GroupQueryAttention {kind}", kind, _gqa
        yield f"RotaryEmbedding {kind}", kind, _rotation
        yield f"SkipSimplifiedLayerNormalization {kind}", kind, _norm
        for bits in (4, 8):
            for fused in ("0", "1") if place.device != "cpu" else ("0",):
                yield (f"MatMulNBits int{bits}/32 {kind}{' fpA_intB' if fused == '1' else ''}", kind,
                       partial(_nbits, bits=bits, fused=fused))
    if place.device == "cpu":
        return
    for kind in ("bf16", "fp16"):
        yield f"PagedAttention {kind}", kind, partial(_paged, cache=kind)
    for cache in ("int8", "fp8"):
        yield f"PagedAttention bf16, {cache} caches", "bf16", partial(_paged, cache=cache)
    yield "MatMulBlockQuantizedFp8Weight bf16", "bf16", _fp8_weight


def _random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def _routing(graph: Graph, tokens: int, seed: int) -> tuple[str, Array]:
    """Logits of which one is 0 and the others so low that the chosen expert's weight is exactly 1."""
    chosen = np.random.default_rng(seed).integers(0, E, tokens)
    logits = np.full((tokens, E), -1e4)
    logits[np.arange(tokens), chosen] = 0
    return graph.weight("logits", logits), chosen


def _moe(place: Place, kind: str) -> Iterator[tuple[Array, Array, float]]:
    gate_up, down = _random(E, 2 * F, D) / np.sqrt(D), _random(E, D, F) / np.sqrt(F)
    for tokens in (1, 7, 64):
        graph, x = Graph(kind), _random(tokens, D)
        logits, chosen = _routing(graph, tokens, tokens)
        weights = graph.weight("gate_up", interleaved(gate_up)), "", graph.weight("down", down)
        graph.output(graph.add("MoE", graph.activation("x", [tokens, D]), logits, *weights, domain=CONTRIB, **SWIGLU),
                     "y", [tokens, D])
        found = Session(graph.model(), place).result("y", x=x.astype(np.float32))
        yield found, routed_experts(x, chosen, gate_up, down), LIMITS[kind]


def _qmoe(place: Place, kind: str, bits: int, block: int) -> Iterator[tuple[Array, Array, float]]:
    parts = [quantized(w, bits, block if block > 0 else w.shape[-1])
             for w in (_random(E, 2 * F, D) / np.sqrt(D), _random(E, D, F) / np.sqrt(F))]
    (codes, scales, gate_up), (down_codes, down_scales, down) = parts
    if block < 0:
        scales, down_scales = scales[..., 0], down_scales[..., 0]
    attributes = SWIGLU | {"expert_weight_bits": bits} | ({"block_size": block} if block > 0 else {})
    if place.device != "cpu":
        attributes |= {"weights_prepacked": 0}
    for tokens in (1, 7, 64):
        graph, x = Graph(kind), _random(tokens, D)
        logits, chosen = _routing(graph, tokens, tokens)
        weights = (graph.weight("gate_up", interleaved(codes), "uint8"), graph.weight("gate_up.s", interleaved(scales)),
                   "", graph.weight("down", down_codes, "uint8"), graph.weight("down.s", down_scales))
        y = graph.add("QMoE", graph.activation("x", [tokens, D]), logits, *weights, domain=CONTRIB, **attributes)
        graph.output(y, "y", [tokens, D])
        found = Session(graph.model(), place).result("y", x=x.astype(np.float32))
        yield found, routed_experts(x, chosen, gate_up, down), LIMITS[kind]


def _nbits(place: Place, kind: str, bits: int, fused: str) -> Iterator[tuple[Array, Array, float]]:
    codes, scales, w = quantized(_random(512, D) / np.sqrt(D), bits, 32)
    for tokens in (1, 8, 64):
        graph, x = Graph(kind), _random(tokens, D)
        packed = graph.weight("w", codes.reshape(512, D // 32, -1), "uint8")
        graph.output(graph.add("MatMulNBits", graph.activation("x", [tokens, D]), packed, graph.weight("s", scales),
                               domain=CONTRIB, K=D, N=512, bits=bits, block_size=32), "y", [tokens, 512])
        session = Session(graph.model(), place, {"ep.cuda.fpa_intb_gemm": fused} if place.device != "cpu" else {})
        yield session.result("y", x=x.astype(np.float32)), x @ w.T, LIMITS[kind]


def _fp8_weight(place: Place, kind: str) -> Iterator[tuple[Array, Array, float]]:
    width, block = 384, 128
    w = _random(512, width) / np.sqrt(width)
    blocks = w.reshape(512, -1, block)
    scales = np.abs(blocks).max(-1) / 448
    codes = (blocks / scales[..., None]).astype(ml_dtypes.float8_e4m3fn)
    w = (codes.astype(np.float64) * scales[..., None]).reshape(w.shape)
    for tokens in (1, 8, 64):
        graph, x = Graph(kind), _random(tokens, width)
        weights = graph.weight("w", codes.reshape(w.shape), "fp8"), graph.weight("s", scales, "fp32")
        graph.output(graph.add("MatMulBlockQuantizedFp8Weight", graph.activation("x", [tokens, width]), *weights,
                               domain=CONTRIB, block_size=block), "y", [tokens, 512])
        yield Session(graph.model(), place).result("y", x=x.astype(np.float32)), x @ w.T, LIMITS[kind]


def _rotation(place: Place, kind: str) -> Iterator[tuple[Array, Array, float]]:
    """Neighbours in pairs, at positions out of order."""
    graph, x, positions = Graph(kind), _random(5, H, K), np.array([7, 0, 3, 500, 42])
    cos, sin = rotary_tables(512, K)
    y = graph.add("RotaryEmbedding", graph.activation("x", [1, H, 5, K]), graph.weight("cos", cos),
                  graph.weight("sin", sin), graph.weight("positions", positions[None], "int64"), interleaved=1)
    graph.output(y, "y", [1, H, 5, K])
    found = Session(graph.model(), place).result("y", x=x.swapaxes(0, 1)[None].astype(np.float32))
    yield found[0].swapaxes(0, 1), rotated(x, positions, cos, sin), LIMITS[kind]


def _norm(place: Place, kind: str) -> Iterator[tuple[Array, Array, float]]:
    """The sum of two, normed and as it is."""
    graph, x, skip, gain = Graph(kind), _random(7, D), _random(7, D, seed=1), 1 + 0.1 * _random(D)
    y, _, _, total = graph.add(
        "SkipSimplifiedLayerNormalization", graph.activation("x", [7, D]), graph.activation("skip", [7, D]),
        graph.weight("gain", gain), outputs=("y0", "", "", "total0"), domain=CONTRIB, epsilon=1e-5)
    graph.output(y, "y", [7, D])
    graph.output(total, "total", [7, D])
    session, inputs = Session(graph.model(), place), {"x": x.astype(np.float32), "skip": skip.astype(np.float32)}
    session.fix_output("total", [7, D])
    yield session.result("y", **inputs), normed(x + skip) * gain, LIMITS[kind]
    yield session.read("total"), x + skip, LIMITS[kind]


def _gqa(place: Place, kind: str) -> Iterator[tuple[Array, Array, float]]:
    """A prompt, a chunk after it and a token, then three prompts and tokens side by side, in shared buffers."""
    slots = 64
    for batch, calls in ((1, (33, 8, 1)), (3, (33, 1))):
        graph = Graph(kind)
        q, k, v = (graph.activation(name, [batch, "s", heads * K]) for name, heads in (("q", H), ("k", G), ("v", G)))
        past = [graph.input(f"past.{part}", kind, [batch, G, slots, K]) for part in "kv"]
        lengths = graph.input("last", "int32", [batch]), graph.input("total", "int32", [1])
        y, *_ = graph.add("GroupQueryAttention", q, k, v, *past, *lengths, outputs=("y0", "now.k", "now.v"),
                          domain=CONTRIB, num_heads=H, kv_num_heads=G)
        graph.output(y, "y", [batch, "s", H * K])
        for part in "kv":
            graph.output(f"now.{part}", f"now.{part}", [batch, G, slots, K], kind)
        session = Session(graph.model(), place, provider={"sdpa_kernel": "1"})
        for part in "kv":
            session.cache(f"past.{part}", f"now.{part}", [batch, G, slots, K], kind)
        total = sum(calls)
        full = [_random(batch, total, heads, K, seed=index) for index, heads in enumerate((H, G, G))]
        done = 0
        for tokens in calls:
            new = [part[:, done : done + tokens].reshape(batch, tokens, -1).astype(np.float32) for part in full]
            done += tokens
            found = session.result("y", q=new[0], k=new[1], v=new[2], last=np.full(batch, done - 1, np.int32),
                                   total=np.array([done], np.int32))
            wanted = np.stack([attention(full[0][b, done - tokens : done], full[1][b, :done], full[2][b, :done])
                               for b in range(batch)])
            yield found, wanted.reshape(found.shape), LIMITS[kind]


def _paged(place: Place, kind: str, cache: str) -> Iterator[tuple[Array, Array, float]]:
    """Three sequences of different lengths in one call: prompts, then a chunk beside tokens, over two blocks.

    Norms of queries and keys and the rotation are the operator's own, as a layer of Llama 4 wants them.
    """
    size, blocks, width = 128, 8, (H + 2 * G) * K
    cos, sin = rotary_tables(512, K)
    graph = Graph(kind)
    qkv = graph.activation("qkv", ["n", width])
    caches = [graph.input(f"past.{part}", cache, [blocks, size, G, K]) for part in "kv"]
    dims: dict[str, list[int | str]] = {"cum": ["b1"], "past": ["b"], "table": ["b", "w"]}
    places = [graph.input(name, "int32", shape) for name, shape in dims.items()]
    ones = [graph.weight(f"one.{part}", np.ones(K)) for part in "qk"]
    is_8_bit = cache != kind
    scales = [graph.weight(f"scale.{part}", np.array([0.04]), "fp32") if is_8_bit else "" for part in "kv"]
    attributes: dict[str, Any] = {"k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR"} if is_8_bit else {}
    y, *_ = graph.add("PagedAttention", qkv, "", "", *caches, *places, graph.weight("cos", cos),
                      graph.weight("sin", sin), "", "", *ones, *scales, graph.input("bounds", "int32", [2]),
                      outputs=("y0", "now.k", "now.v"), domain=CONTRIB, num_heads=H, kv_num_heads=G, do_rotary=1,
                      rotary_interleaved=1, qk_norm_epsilon=1e-5, **attributes)
    graph.output(y, "y", ["n", H * K])
    for part in "kv":
        graph.output(f"now.{part}", f"now.{part}", [blocks, size, G, K], cache)
    session = Session(graph.model(), place)
    for part in "kv":
        session.cache(f"past.{part}", f"now.{part}", [blocks, size, G, K], cache)
    table = np.array([[5, 2], [0, 7], [3, 6]], np.int32)
    lengths = np.zeros(3, np.int32)
    full = [[_random(256, heads, K, seed=10 * b + part) for part, heads in enumerate((H, G, G))] for b in range(3)]
    for new in ((120, 5, 64), (16, 1, 1), (1, 1, 1)):
        parts = [[part[lengths[b] : lengths[b] + new[b]] for part in full[b]] for b in range(3)]
        packed = np.concatenate([np.concatenate([part.reshape(new[b], -1) for part in parts[b]], 1) for b in range(3)])
        found = session.result(
            "y", qkv=packed.astype(np.float32), cum=np.cumsum([0, *new]).astype(np.int32), past=lengths, table=table,
            bounds=np.array([max(new), 256], np.int32))
        ends = lengths + np.array(new, np.int32)
        wanted = np.concatenate([_attended(full[b], lengths[b], ends[b], cos, sin) for b in range(3)])
        lengths = ends.astype(np.int32)
        yield found, wanted, CACHE_LIMITS.get(cache, LIMITS[kind])


def _attended(parts: list[Array], begin: int, end: int, cos: Array, sin: Array) -> Array:
    """What a layer's attention gives for tokens ``begin`` to ``end`` of a sequence."""
    q, k, v = parts
    q = rotated(normed(q[begin:end]), np.arange(begin, end), cos, sin)
    k = rotated(normed(k[:end]), np.arange(end), cos, sin)
    return attention(q, k, v[:end]).reshape(end - begin, -1)
