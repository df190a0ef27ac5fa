"""Step 5: all of Scout in int4: 48 layers, 57 GB on the GPU, every tensor with the same bytes as in layer 0."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from .attention_sessions import BLOCK
from .check import Place, Report
from .environment import memory_used
from .layer_graph import SCOUT, SMALL, Decoder, Shape
from .scout_layer import feed
from .session import Session
from .weight_files import WeightFiles

LAYERS, VOCABULARY = 48, 202_048
CONTEXT = 1024
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
    model = Model(place, report, shape, layers, vocabulary, folder)
    model.write()
    session = model.load({})
    report.measure("memory [GB]", memory_used() / 1e9, f"weights {model.bytes / 1e9:.1f} GB", timed=place.timed)
    for batch in (1, 8, 32):
        model.measure(session, f"decode, {batch} sequences", batch, 1, CONTEXT if place.timed else 2 * BLOCK)
    model.measure(session, "prefill", 1, 2048 if place.timed else 64, 0)
    del session
    captured = model.load({"enable_cuda_graph": "1"}) if place.left > 30 else None
    if captured:
        model.measure(captured, "decode, 1 sequence, CUDA graph", 1, 1, CONTEXT if place.timed else 2 * BLOCK)


@dataclass(frozen=True)
class Model:
    """A model whose weights are parts of a few files, and what is measured of it.

    Attributes:
        place: where it runs.
        report: is told what was measured.
        shape: of a layer.
        layers: how many.
        vocabulary: of the head.
        folder: of the files.
    """

    place: Place
    report: Report
    shape: Shape
    layers: int
    vocabulary: int
    folder: Path

    @property
    def bytes(self) -> float:
        """Of all weights on the GPU."""
        return self.layers * self.shape.bytes_in_all("int4") + 2.0 * self.shape.width * self.vocabulary

    def write(self) -> None:
        """The graph, and the files."""
        began, files = time.monotonic(), WeightFiles(self.folder)
        decoder = Decoder(self.shape, "int4", files.source()).build(self.layers, self.vocabulary)
        (self.folder / "model.onnx").write_bytes(decoder)
        self.report.measure("files [GB]", files.write() / 1e9, f"{time.monotonic() - began:.1f} s to write",
                            timed=self.place.timed)

    def load(self, provider: dict[str, str]) -> Session:
        """A session."""
        began = time.monotonic()
        # An arena that doubles would ask for 64 GB where 57 are needed.
        session = Session(self.folder / "model.onnx", self.place, {"ep.cuda.fpa_intb_gemm": "1"},
                          {"arena_extend_strategy": "kSameAsRequested", **provider})
        self.report.measure(f"load{', CUDA graph' if provider else ''} [s]", time.monotonic() - began,
                            f"{self.layers} layers", timed=self.place.timed)
        return session

    def measure(self, session: Session, name: str, batch: int, tokens: int, past: int) -> None:
        """Tokens per second of a call, unless the time is up."""
        if self.place.left < 15:
            self.report.skip(name, "the time was up")
            return
        with self.report.attempt(name):
            feed(session, self.shape, self.layers, batch, tokens, past, result=self.vocabulary)
            seconds = session.seconds(*((2, 50) if self.place.timed else (0, 1)))
            self.report.measure(f"{name} [tokens/s]", batch * tokens / seconds,
                                f"{1e3 * seconds:.2f} ms, {self.layers} layers, {past} tokens before",
                                timed=self.place.timed)
