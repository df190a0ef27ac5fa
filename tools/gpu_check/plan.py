"""The list: every step with the seconds that it may take, what proves most and costs least first."""

from __future__ import annotations

from typing import NamedTuple


class Step(NamedTuple):
    """A step, which is the module of this folder with its name.

    Attributes:
        name: of the module.
        seconds: that it may take; then it is ended, and what it found so far counts.
        purpose: one line for people.
    """

    name: str
    seconds: int
    purpose: str


STEPS = (
    Step("environment", 60, "driver, GPU and onnxruntime-gpu; the CUDA provider computes on itself"),
    Step("operators", 70, "every operator that a bundle may hold against its formula in float64"),
    Step("tiny_herds", 60, "tiny models through Engine on the GPU against the same models on the CPU"),
    Step("cuda_graphs", 40, "a captured CUDA graph says what eager calls say, over lengths and batches"),
    Step("scout_layer", 80, "one layer of Scout: microseconds against bytes and operations; two kinds of attention"),
    Step("whole_scout", 145, "all 48 layers of Scout in int4, one layer's bytes for all: tokens per second, memory"),
    Step("collectives", 25, "NCCL with one rank and with two on one GPU"),
    Step("ranks", 35, "a tiny model split over two ranks on one GPU, with NCCL inside of its CUDA graphs"),
    Step("device_memory", 15, "copies, pitched copies and streams of the TensorRT runtime"),
    Step("staging", 10, "its staging buffers and caches, around an engine that moves bytes and computes nothing"),
)
SECONDS = 540
"""Of all steps together; steps that would begin later are skipped."""
