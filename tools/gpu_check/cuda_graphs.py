"""Step 3: a captured CUDA graph says what eager calls say, for 64 steps over a block's end."""

from __future__ import annotations

import numpy as np

from .attention_sessions import BLOCK
from .check import Place, Report
from .formulas import error
from .graphs import Array
from .layer_graph import SMALL, Decoder, random_weights, tables
from .session import Session

STEPS, BEGIN, LAYERS = 64, 100, 2
"""From token 100 on, so that the second block of a sequence begins on the way."""


def run(place: Place, report: Report) -> None:
    """Both kinds of experts."""
    if place.device == "cpu":
        report.skip("CUDA graphs", "the CPU provider has none")
        return
    for experts in ("bf16", "int4"):
        for batch in (1, 4):
            name = f"captured = eager, {experts}, {batch} sequences"
            with report.attempt(name):
                report.error(name, _difference(place, experts, batch), 1e-2, real=place.real)


def _difference(place: Place, experts: str, batch: int) -> float:
    """Largest relative difference of a step between a captured and an eager session over the same caches."""
    model = Decoder(SMALL, experts, random_weights()).build(LAYERS)
    eager, captured = Session(model, place), Session(model, place, provider={"enable_cuda_graph": "1"})
    generator = np.random.default_rng(0)
    _begin(eager, batch, generator)
    captured.share_caches(eager)
    for session in (eager, captured):
        _fix(session, batch)
    worst = 0.0
    for step in range(STEPS):
        x = generator.standard_normal((batch, SMALL.width)).astype(np.float32)
        past = np.full(batch, BEGIN + step, np.int32)
        # The first runs of a captured session only look; the same again writes the same keys and values.
        results = [_run(session, x, past, 3 if step == 0 else 1) for session in (eager, captured)]
        worst = max(worst, error(results[1], results[0].astype(np.float64))) if place.real else 0.0
    return worst


def _begin(session: Session, batch: int, generator: np.random.Generator) -> None:
    """Caches with a prompt in them."""
    for layer in range(LAYERS):
        for part in "kv":
            session.cache(f"past.{layer}.{part}", f"now.{layer}.{part}", [2 * batch, BLOCK, SMALL.groups, SMALL.head],
                          "bf16")
    given = tables(batch, 2 * BLOCK)
    session.result("y", x=generator.standard_normal((batch * BEGIN, SMALL.width)).astype(np.float32),
                   past=np.zeros(batch, np.int32), cum=np.arange(batch + 1, dtype=np.int32) * BEGIN,
                   table=given["table"], bounds=np.array([BEGIN, 2 * BLOCK], np.int32))


def _fix(session: Session, batch: int) -> None:
    """Inputs and the result at addresses that a captured graph can keep."""
    given = tables(batch, 2 * BLOCK)
    session.fix(x=np.zeros((batch, SMALL.width), np.float32), past=np.zeros(batch, np.int32),
                cum=np.arange(batch + 1, dtype=np.int32), table=given["table"])
    session.bind(bounds=given["bounds"])
    session.fix_output("y", [batch, SMALL.width])


def _run(session: Session, x: Array, past: Array, times: int) -> Array:
    session.update(x=x, past=past)
    for _ in range(times):
        session.run()
    return session.read("y")
