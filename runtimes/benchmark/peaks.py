"""What this machine can do at most, measured beside every benchmark: the denominators of roofline utilization.

* read bandwidth: a product of a vector with a 512 MB float32 matrix, which reads every element once;
* GEMM rates: square products large enough to be limited by arithmetic, float32 and 8-bit.

All three run in ONNX Runtime, on the threads that the engine uses. The operators come as two tiny models, because the
runtime has no library to write one; ``tests/runtimes/benchmark/test_bench.py`` compares them with their text.
"""

from __future__ import annotations

import base64
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..executors.ort.session import load_onnxruntime

# g (float[M,K] a, float[K,N] b) => (float[M,N] y) { y = MatMul (a, b) }
FP32_MATMUL = base64.b64decode(
    "CAo6XQoTCgFhCgFiEgF5IgZNYXRNdWw6ABIBZ1oVCgFhEhAKDggBEgoKAxIBTQoDEgFLWhUKAWISEAoOCAESCgoDEgFLCgMSAU5i"
    "FQoBeRIQCg4IARIKCgMSAU0KAxIBTkIECgAQFQ=="
)
# g (uint8[M,K] a, int8[K,N] b) => (int32[M,N] y) { y = MatMulInteger (a, b) }
INT8_MATMUL = base64.b64decode(
    "CAo6ZAoaCgFhCgFiEgF5Ig1NYXRNdWxJbnRlZ2VyOgASAWdaFQoBYRIQCg4IAhIKCgMSAU0KAxIBS1oVCgFiEhAKDggDEgoKAxIB"
    "SwoDEgFOYhUKAXkSEAoOCAYSCgoDEgFNCgMSAU5CBAoAEBU="
)

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class HardwarePeaks:
    """Rates per second on a number of threads.

    Attributes:
        threads: 0 for one per core.
        read_bandwidth: bytes.
        fp32_gemm: floating-point operations, multiplications and additions.
        int8_gemm: integer operations.
    """

    floats: ClassVar[str] = "fp32"
    threads: int
    read_bandwidth: float
    fp32_gemm: float
    int8_gemm: float

    @property
    def float_gemm(self) -> float:
        """Rate of the type that activations have."""
        return self.fp32_gemm

    def __str__(self) -> str:
        return (f"{self.read_bandwidth / 1e9:.1f} GB/s read, {self.fp32_gemm / 1e9:.0f} GFLOP/s fp32, "
                f"{self.int8_gemm / 1e9:.0f} GOP/s int8")


def measure_peaks(threads: int | None = None, *, bandwidth_rows: int = 4096, side: int = 2048) -> HardwarePeaks:
    """Measure; takes about three seconds with the defaults.

    Args:
        threads: as for ``Engine.load``.
        bandwidth_rows: rows of the matrix whose reading is timed, 128 KiB each: it has to exceed the caches.
        side: side of the square products.
    """
    matrix = np.ones((bandwidth_rows, 32768), np.float32)
    read = _seconds(FP32_MATMUL, np.ones((1, bandwidth_rows), np.float32), matrix, np.float32, threads)
    read_bytes = matrix.nbytes
    del matrix
    square = np.ones((side, side), np.float32)
    fp32 = _seconds(FP32_MATMUL, square, square, np.float32, threads)
    int8 = _seconds(INT8_MATMUL, square.astype(np.uint8), square.astype(np.int8), np.int32, threads)
    operations = 2 * side**3
    return HardwarePeaks(threads or 0, read_bytes / read, operations / fp32, operations / int8)


def _seconds(model: bytes, a: Array, b: Array, result: type[np.generic], threads: int | None) -> float:
    """Median time of one product."""
    onnxruntime = load_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    io, value = session.io_binding(), onnxruntime.OrtValue.ortvalue_from_numpy
    y = np.zeros((len(a), b.shape[1]), result)  # a binding of onnxruntime before 1.30 does not keep its arrays alive
    io.bind_ortvalue_input("a", value(a))
    io.bind_ortvalue_input("b", value(b))
    io.bind_ortvalue_output("y", value(y))
    return median_seconds(lambda: session.run_with_iobinding(io))


def median_seconds(run: Callable[[], object], repeats: int = 5) -> float:
    """Median duration of a call after one to warm up."""
    run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)
