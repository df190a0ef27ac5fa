"""Step 8: device memory, pitched copies and the stream of the TensorRT runtime, without TensorRT."""

from __future__ import annotations

from typing import Any

import numpy as np

from .check import Place, Report


def run(place: Place, report: Report) -> None:
    """What ``runtimes/executors/tensorrt/cuda.py`` does for a runner of plans, on data that is read back."""
    if not place.timed:
        report.skip("device memory", "cuda-bindings asks the driver itself, which only a machine with a GPU has")
        return
    from herdgraph.runtimes.executors.tensorrt.cuda import Cuda, DeviceMemory

    cuda = Cuda()
    report.holds("compute capability", cuda.compute_capability.isdigit(), f"SM {cuda.compute_capability}")
    with report.attempt("up and down"):
        sent = np.random.default_rng(0).standard_normal((64, 1000)).astype(np.float32)
        block, found = cuda.allocate(sent.nbytes), np.zeros_like(sent)
        cuda.upload(sent, block.pointer)
        cuda.download(block.pointer, found)
        report.holds("up and down", bool((found == sent).all()))
    with report.attempt("caches"):
        _caches(cuda, DeviceMemory(cuda, 2), report)


def _caches(cuda: Any, memory: Any, report: Report) -> None:
    """New keys go to their slots, a cache grows, and one sequence leaves a batch: numpy says what must come out."""
    batch, groups, slots, width, tokens = 2, 3, 8, 16, 2
    new = np.random.default_rng(1).integers(0, 1 << 16, (batch, groups, tokens, width), np.uint16)
    wanted = np.zeros((batch, groups, slots, width), np.uint16)
    staged = cuda.allocate(new.nbytes)
    cuda.upload(new, staged.pointer)
    cache = memory.zeros(wanted.shape)
    memory.append(staged.pointer, tokens, cache, [1, 5])
    for index, slot in enumerate((1, 5)):
        wanted[index, :, slot : slot + tokens] = new[index]
    found = np.zeros_like(wanted)
    cuda.download(cache.pointer, found)
    report.holds("append", bool((found == wanted).all()))
    larger = memory.zeros((batch, groups, 2 * slots, width))
    grown = np.zeros(larger.shape, np.uint16)
    memory.copy(cache, larger)
    cuda.download(larger.pointer, grown)
    report.holds("grow", bool((grown[:, :, :slots] == wanted).all() and not grown[:, :, slots:].any()))
    row = np.zeros_like(wanted[:1])
    cuda.download(memory.row(cache, 1).pointer, row)
    report.holds("row", bool((row == wanted[1:]).all()))
