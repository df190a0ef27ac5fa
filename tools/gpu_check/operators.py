"""Step 1: every operator that a bundle for CUDA may hold against its formula, in Scout's shapes divided by 16."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import ml_dtypes
import numpy as np

from .attention_sessions import BLOCK, POSITIONS, Heads, grouped, paged
from .check import Place, Report
from .formulas import attention, error, interleaved, normed, quantized, rotary_tables, rotated, routed_experts
from .graphs import CONTRIB, Array, Graph
from .session import Session

D, F, E, H, G, K = 320, 512, 16, 10, 2, 128
"""Width, width of an expert, experts, heads, heads of keys and values, width of a head."""
HEADS = Heads(H, G, K)
Case = Callable[[Place, str], Iterator[tuple[Array, Array, float]]]
"""Pairs of what was found and what is right, each with its limit, for a type."""
SWIGLU = {"k": 1, "normalize_routing_weights": 1, "activation_type": "swiglu", "swiglu_fusion": 1,
          "activation_alpha": 1.0, "activation_beta": 0.0}
LIMITS = {"fp32": 2e-5, "fp16": 1e-3, "bf16": 1e-2}
CACHE_LIMITS = {"int8": 3e-2, "fp8": 8e-2}


def run(place: Place, report: Report) -> None:
    """All of them; one that raises does not end the others."""
    for name, kind, check in _cases(place):
        if place.left < 2:
            report.skip(name, "the time was up")
            continue
        with report.attempt(name):
            for part, (found, wanted, limit) in enumerate(check(place, kind)):
                report.error(f"{name} {part}" if part else name, error(found, wanted), limit, real=place.real)


def _cases(place: Place) -> Iterator[tuple[str, str, Case]]:
    """Name, type and check; bfloat16, which bundles are in, comes first."""
    if place.device == "cpu":
        yield from _common("fp32", ("0",))
        return
    yield from _common("bf16", ("0", "1"))
    for cache in ("bf16", "int8", "fp8"):
        yield f"PagedAttention bf16, {cache} caches", "bf16", partial(_paged, cache=cache)
    yield "MatMulBlockQuantizedFp8Weight bf16", "bf16", _fp8_weight
    yield from _common("fp16", ("0", "1"))
    yield "PagedAttention fp16", "fp16", partial(_paged, cache="fp16")


def _common(kind: str, fused: tuple[str, ...]) -> Iterator[tuple[str, str, Case]]:
    """What a CPU has, too."""
    yield f"MoE {kind}", kind, _moe
    yield f"QMoE int4/32 {kind}", kind, partial(_qmoe, bits=4, block=32)
    yield f"QMoE int8/channel {kind}", kind, partial(_qmoe, bits=8, block=-1)
    yield f"GroupQueryAttention {kind}", kind, _gqa
    yield f"RotaryEmbedding {kind}", kind, _rotation
    yield f"SkipSimplifiedLayerNormalization {kind}", kind, _norm
    for bits in (4, 8):
        for way in fused:
            yield (f"MatMulNBits int{bits}/32 {kind}{' fpA_intB' if way == '1' else ''}", kind,
                   partial(_nbits, bits=bits, fused=way))


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
    cos, sin = rotary_tables(POSITIONS, K)
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
    for batch, calls in ((1, (33, 8, 1)), (3, (33, 1))):
        session = grouped(place, HEADS, kind, kind, batch, 64)
        q, k, v = (_random(batch, sum(calls), heads, K, seed=index) for index, heads in enumerate((H, G, G)))
        end = 0
        for tokens in calls:
            begin, end = end, end + tokens
            new = {name: part[:, begin:end].reshape(batch, tokens, -1).astype(np.float32)
                   for name, part in (("q", q), ("k", k), ("v", v))}
            found = session.result("y", **new, last=np.full(batch, end - 1, np.int32), total=np.array([end], np.int32))
            wanted = [attention(q[b, begin:end], k[b, :end], v[b, :end]) for b in range(batch)]
            yield found, np.stack(wanted).reshape(found.shape), LIMITS[kind]


def _paged(place: Place, kind: str, cache: str) -> Iterator[tuple[Array, Array, float]]:
    """Three sequences of different lengths in one call: prompts, then a chunk beside tokens, over two blocks."""
    session = paged(place, HEADS, kind, cache, 8, prologue=True)
    table, lengths = np.array([[5, 2], [0, 7], [3, 6]], np.int32), np.zeros(3, np.int32)
    parts = [[_random(256, heads, K, seed=10 * b + part) for part, heads in enumerate((H, G, G))] for b in range(3)]
    for new in ((120, 5, 64), (16, 1, 1), (1, 1, 1)):
        ends = lengths + np.array(new, np.int32)
        spans = list(zip(parts, lengths, ends, strict=True))
        packed = [np.concatenate([part[begin:end].reshape(end - begin, -1) for part in own], 1)
                  for own, begin, end in spans]
        found = session.result(
            "y", qkv=np.concatenate(packed).astype(np.float32), cum=np.cumsum([0, *new]).astype(np.int32), past=lengths,
            table=table, bounds=np.array([max(new), 2 * BLOCK], np.int32))
        yield found, np.concatenate([_attended(*span) for span in spans]), CACHE_LIMITS.get(cache, LIMITS[kind])
        lengths = ends


def _attended(parts: list[Array], begin: int, end: int) -> Array:
    """What a layer's attention gives for tokens ``begin`` to ``end`` of a sequence: normed, rotated, attended."""
    (q, k, v), (cos, sin) = parts, rotary_tables(POSITIONS, K)
    q = rotated(normed(q[begin:end]), np.arange(begin, end), cos, sin)
    k = rotated(normed(k[:end]), np.arange(end), cos, sin)
    return attention(q, k, v[:end]).reshape(end - begin, -1)
