"""Step 5: all of Scout in int4: 48 layers, 57 GB on the GPU, every tensor with the same bytes as in layer 0."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from .check import Place, Report
from .environment import memory_used
from .graphs import TYPES
from .layer_graph import BLOCK, SCOUT, SMALL, Decoder, Shape
from .scout_layer import feed
from .session import Session
from .weight_files import WeightFiles

LAYERS, VOCABULARY = 48, 202_048
CONTEXT = 2048
"""Tokens that a sequence has when a token is timed."""


def run(place: Place, report: Report) -> None:
    """As many layers as the GPU has memory for, all of them on 80 GB."""
    if place.device == "cpu":
        report.skip("whole Scout", "in types that the CPU provider has not")
        return
    shape, layers, vocabulary = (SCOUT, _fitting(SCOUT), VOCABULARY) if place.timed else (SMALL, 3, 1024)
    with report.attempt("whole Scout"), tempfile.TemporaryDirectory() as folder:
        _scout(place, report, shape, layers, vocabulary, Path(folder))


def _fitting(shape: Shape) -> int:
    """Layers for which the first GPU has memory."""
    from herdgraph.runtimes.machine.driver import find_driver

    room = 0.92 * find_driver().gpus[0].memory - shape.width * VOCABULARY * 2 - (6 << 30)
    return max(1, min(LAYERS, int(room / shape.bytes_in_all("int4"))))


def _scout(place: Place, report: Report, shape: Shape, layers: int, vocabulary: int, folder: Path) -> None:
    files = WeightFiles(folder)
    (folder / "model.onnx").write_bytes(Decoder(shape, "int4", files.source()).build(layers, vocabulary))
    began = time.monotonic()
    written = files.write()
    report.measure("files [GB]", written / 1e9, f"{time.monotonic() - began:.1f} s to write", timed=place.timed)
    began = time.monotonic()
    session = _session(place, folder, {})
    report.measure("load [s]", time.monotonic() - began, f"{layers} layers", timed=place.timed)
    report.measure("memory [GB]", memory_used() / 1e9, f"weights {_bytes(shape, layers, vocabulary) / 1e9:.1f} GB",
                   timed=place.timed)
    context = CONTEXT if place.timed else 2 * BLOCK
    for batch in (1, 8, 32):
        if place.left < 15:
            report.skip(f"decode {batch}", "the time was up")
            continue
        with report.attempt(f"decode {batch}"):
            feed(session, shape, layers, batch, 1, context, result=vocabulary)
            seconds = session.seconds(*((2, 50) if place.timed else (0, 1)))
            report.measure(f"decode, {batch} sequences [tokens/s]", batch / seconds,
                           f"{1e3 * seconds:.2f} ms per step, {layers} layers, {context} tokens each",
                           timed=place.timed)
    if place.left > 20:
        with report.attempt("prefill"):
            prompt = 2048 if place.timed else 64
            feed(session, shape, layers, 1, prompt, 0, result=vocabulary)
            report.measure(f"prefill of {prompt} [tokens/s]", prompt / session.seconds(0, 3), "logits of every token",
                           timed=place.timed)
    del session
    if place.left > 30:
        with report.attempt("decode as a CUDA graph"):
            captured = _session(place, folder, {"enable_cuda_graph": "1"})
            feed(captured, shape, layers, 1, 1, context, result=vocabulary)
            seconds = captured.seconds(*((2, 50) if place.timed else (0, 1)))
            report.measure("decode, 1 sequence, CUDA graph [tokens/s]", 1 / seconds, f"{1e3 * seconds:.2f} ms per step",
                           timed=place.timed)


def _session(place: Place, folder: Path, provider: dict[str, str]) -> Session:
    # An arena that doubles would ask for 64 GB where 57 are needed.
    return Session(folder / "model.onnx", place, {"ep.cuda.fpa_intb_gemm": "1"},
                   {"arena_extend_strategy": "kSameAsRequested", **provider})


def _bytes(shape: Shape, layers: int, vocabulary: int) -> float:
    return layers * shape.bytes_in_all("int4") + shape.width * vocabulary * TYPES["bf16"][1](0).nbytes
