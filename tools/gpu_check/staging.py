"""Step 9: how the TensorRT runtime brings a call to the GPU and back, around an engine that only moves bytes.

No TensorRT of any kind can be run on H100 or H200 with what PyPI has. What is around it can: staging buffers that grow,
caches that are read where they lie, new keys and values that go to their slots, inputs that are on the device already.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from .check import Place, Report
from .moving_engine import GROUPS, HEAD, MovingEngine, package_of

BATCH, SLOTS = 2, 16


def run(place: Place, report: Report) -> None:
    """Two calls of different sizes, then one whose tokens lie on the device."""
    if not place.timed:
        report.skip("staging", "cuda-bindings asks the driver itself, which only a machine with a GPU has")
        return
    from herdgraph.runtimes.executors.tensorrt import cuda, device

    gpu = cuda.Cuda()
    with report.attempt("staging"), tempfile.NamedTemporaryFile() as plan:
        engine = MovingEngine(gpu)
        executor = device.DeviceExecutor(Path(plan.name), package=package_of(engine), cuda=gpu, chunks=(0,))
        _calls(executor, gpu, report)


def _calls(executor: Any, gpu: Any, report: Report) -> None:
    from herdgraph.runtimes.executors.device_array import DeviceArray

    shape = (BATCH, GROUPS, SLOTS, HEAD)
    keys, values = executor.memory.zeros(shape), executor.memory.zeros(shape)
    wanted_keys, wanted_values = np.zeros((2, *shape), np.uint16)
    random = np.random.default_rng(0)
    for name, slots, tokens in (("first call", [0, 2], 3), ("larger call", [3, 5], 8), ("on the device", [11, 13], 2)):
        ids = random.integers(0, 1 << 40, (BATCH, tokens))
        call, given = _call(ids, keys, values, slots), {}
        if name == "on the device":
            held = gpu.allocate(ids.nbytes)
            gpu.upload(ids, held.pointer)
            given["input_ids"] = DeviceArray(held.pointer, ids.shape, "int64")
        logits = executor.download(executor.forward(call, given)["logits"])
        _append(wanted_values, wanted_keys[:, :, :tokens].copy(), slots)
        _append(wanted_keys, np.repeat(ids.view(np.uint16).reshape(BATCH, 1, tokens, HEAD), GROUPS, 1), slots)
        report.holds(f"logits, {name}", logits.tobytes() == ids[:, -1].tobytes())
        for part, buffer, wanted in (("keys", keys, wanted_keys), ("values", values, wanted_values)):
            found = np.zeros_like(wanted)
            gpu.download(buffer.pointer, found)
            report.holds(f"{part}, {name}", bool((found == wanted).all()))


def _call(ids: Any, keys: Any, values: Any, slots: list[int]) -> Any:
    from herdgraph.runtimes.executors.tensorrt.executor import Call

    inputs = {"input_ids": ids, "past_lengths": np.asarray(slots), "logit_rows": np.zeros(1, np.int64)}
    return Call(0, inputs, [(keys, values)], [slots])


def _append(cache: Any, new: Any, slots: list[int]) -> None:
    """What the executor has to do to a cache, in numpy."""
    for row, slot in enumerate(slots):
        cache[row, :, slot : slot + new.shape[2]] = new[row]
