"""Step 4: one layer of Scout: what a token and a prompt cost, beside the bytes and operations that they need."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from .attention_sessions import BLOCK, Heads, grouped, paged
from .check import Place, Report
from .layer_graph import SCOUT, SMALL, Decoder, Shape, tables
from .session import Session
from .weight_files import WeightFiles

CONTEXT = 8192
"""Tokens that a sequence has when a token is timed."""


def run(place: Place, report: Report) -> None:
    """Both kinds of experts, then attention alone."""
    if place.device == "cpu":
        report.skip("a layer of Scout", "in types that the CPU provider has not")
        return
    shape, context = (SCOUT, CONTEXT) if place.timed else (SMALL, 4 * BLOCK)
    for experts in ("int4", "bf16"):
        with report.attempt(f"layer {experts}"), tempfile.TemporaryDirectory() as folder:
            _layer(place, report, shape, experts, context, Path(folder))
    heads = Heads(shape.heads, shape.groups, shape.head)
    for cache in ("bf16", "int8", "fp8"):
        for batch in (1, 16):
            with report.attempt(f"PagedAttention {cache} {batch}"):
                _measure(place, report, f"PagedAttention {cache}, {batch} x {context}",
                         _paged(place, heads, cache, batch, context), _cache_bytes(heads, cache, batch, context))
    for cache in ("bf16", "int8"):
        with report.attempt(f"GroupQueryAttention {cache}"):
            _measure(place, report, f"GroupQueryAttention {cache}, 1 x {context}",
                     _grouped(place, heads, cache, context), _cache_bytes(heads, cache, 1, context))


def _layer(place: Place, report: Report, shape: Shape, experts: str, context: int, folder: Path) -> None:
    files = WeightFiles(folder)
    model = Decoder(shape, experts, files.source()).build(1)
    files.write()
    (folder / "model.onnx").write_bytes(model)
    config = {"ep.cuda.fpa_intb_gemm": "1"} if experts == "int4" else {}
    session = Session(folder / "model.onnx", place, config)
    for batch in (1, 8):
        feed(session, shape, 1, batch, 1, context)
        touched = shape.bytes_per_token(experts) if batch == 1 else 0
        _measure(place, report, f"layer {experts}, decode {batch}", session, touched)
    prompt = 2048 if place.timed else 64
    feed(session, shape, 1, 1, prompt, 0)
    _measure(place, report, f"layer {experts}, prefill {prompt}", session, 0, 2.0 * prompt * _parameters(shape))
    captured = Session(folder / "model.onnx", place, config, {"enable_cuda_graph": "1"})
    feed(captured, shape, 1, 1, 1, context)
    _measure(place, report, f"layer {experts}, decode 1 as a CUDA graph", captured, shape.bytes_per_token(experts))


def feed(
    session: Session, shape: Shape, layers: int, batch: int, tokens: int, past: int, *, result: int = 0
) -> None:
    """Inputs of a call of ``tokens`` for each of ``batch`` sequences that have ``past``, and caches for them."""
    generator, given = np.random.default_rng(0), tables(batch, past + tokens)
    arrays = {"x": generator.standard_normal((batch * tokens, shape.width)).astype(np.float32),
              "cum": np.arange(batch + 1, dtype=np.int32) * tokens, "past": np.full(batch, past, np.int32),
              "table": given["table"]}
    session.fix(**arrays)
    session.bind(bounds=np.array([tokens, given["bounds"][1]], np.int32))
    session.fix_output("y", [batch * tokens, result or shape.width])
    for layer in range(layers):
        for part in "kv":
            session.cache(f"past.{layer}.{part}", f"now.{layer}.{part}",
                          [given["table"].size, BLOCK, shape.groups, shape.head], "bf16")


def _parameters(shape: Shape) -> float:
    """Weights that a token meets."""
    return shape.bytes_per_token("bf16") / 2


def _measure(
    place: Place, report: Report, name: str, session: Session, touched: float = 0, operations: float = 0
) -> None:
    """Time a session; says the rate at which it reads what it must read, or computes what it must compute."""
    seconds = session.seconds(*((0.5, 200) if place.timed else (0, 1)))
    rate = f"{touched / seconds / 1e12:.2f} TB/s" if touched else ""
    rate = f"{operations / seconds / 1e12:.0f} TFLOP/s" if operations else rate
    report.measure(f"{name} [us]", 1e6 * seconds, rate, timed=place.timed)


def _cache_bytes(heads: Heads, cache: str, batch: int, context: int) -> float:
    return 2.0 * batch * context * heads.groups * heads.width * (2 if cache == "bf16" else 1)


def _paged(place: Place, heads: Heads, cache: str, batch: int, context: int) -> Session:
    """Attention of a token for each sequence, over blocks."""
    given = tables(batch, context + 1)
    session = paged(place, heads, "bf16", cache, given["table"].size, prologue=False)
    qkv = np.random.default_rng(0).standard_normal((batch, heads.packed)).astype(np.float32)
    session.fix(qkv=qkv, cum=np.arange(batch + 1, dtype=np.int32), past=np.full(batch, context, np.int32),
                table=given["table"])
    session.bind(bounds=given["bounds"])
    session.fix_output("y", [batch, heads.queries * heads.width])
    return session


def _grouped(place: Place, heads: Heads, cache: str, context: int) -> Session:
    """Attention of one token over one buffer."""
    session, generator = grouped(place, heads, "bf16", cache, 1, context + BLOCK), np.random.default_rng(0)
    sizes = (("q", heads.queries), ("k", heads.groups), ("v", heads.groups))
    session.fix(**{name: generator.standard_normal((1, 1, count * heads.width)).astype(np.float32)
                   for name, count in sizes}, last=np.array([context], np.int32))
    session.bind(total=np.array([context + 1], np.int32))
    session.fix_output("y", [1, 1, heads.queries * heads.width])
    return session
