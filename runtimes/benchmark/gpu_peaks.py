"""What a GPU can do at most, measured beside every benchmark of a bundle that runs on one; see ``peaks.py``.

* read bandwidth: a product of a vector with a 2 GiB matrix, far larger than any cache;
* GEMM rate: a square product, bfloat16, summed in float32.

Factors are random: with zeros a GPU draws less power and is faster than it ever is at work.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..executors.ort.cuda.session import PROVIDER
from ..executors.ort.cuda.views import Place
from ..executors.ort.session import load_onnxruntime
from .peaks import median_seconds

# g (bfloat16[M,K] a, bfloat16[K,N] b) => (bfloat16[M,N] y) { y = MatMul (a, b) }
BF16_MATMUL = base64.b64decode(
    "CAo6XQoTCgFhCgFiEgF5IgZNYXRNdWw6ABIBZ1oVCgFhEhAKDggQEgoKAxIBTQoDEgFLWhUKAWISEAoOCBASCgoDEgFLCgMSAU5i"
    "FQoBeRIQCg4IEBIKCgMSAU0KAxIBTkIECgAQFQ=="
)
_BFLOAT16 = 16
"""ONNX's number of the type."""
_PIECE = 64 << 20
"""Bytes of random numbers that a matrix repeats."""


@dataclass(frozen=True)
class GpuPeaks:
    """Rates per second of GPUs that work on the same token.

    Attributes:
        gpus: their number; rates are those of all of them.
        read_bandwidth: bytes.
        bf16_gemm: floating-point operations, multiplications and additions.
    """

    floats: ClassVar[str] = "bf16"
    gpus: int
    read_bandwidth: float
    bf16_gemm: float

    @property
    def float_gemm(self) -> float:
        """Rate of the type that activations have."""
        return self.bf16_gemm

    def __str__(self) -> str:
        return f"{self.read_bandwidth / 1e9:.0f} GB/s read, {self.bf16_gemm / 1e12:.0f} TFLOP/s bf16, {self.gpus} GPU"


def measure_gpu_peaks(place: Place, gpus: int = 1, *, side: int = 32768, square: int = 8192) -> GpuPeaks:
    """Measure one GPU; takes some seconds, and somewhat more than 2 GiB there with the defaults.

    Args:
        place: the GPU.
        gpus: that work like it.
        side: of the matrix whose reading is timed.
        square: side of the square products.
    """
    read, product = _seconds(place, 1, side, side), _seconds(place, square, square, square)
    return GpuPeaks(gpus, gpus * 2 * side**2 / read, gpus * 2 * square**3 / product)


def _seconds(place: Place, rows: int, inner: int, columns: int) -> float:
    """Median time of a product."""
    onnxruntime = load_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    session = onnxruntime.InferenceSession(
        BF16_MATMUL, options, providers=[(PROVIDER, {"device_id": str(place.index)})], enable_fallback=0)
    io = session.io_binding()
    io.bind_ortvalue_input("a", _random(place, rows, inner))
    io.bind_ortvalue_input("b", _random(place, inner, columns))
    io.bind_ortvalue_output("y", place.empty([rows, columns], _BFLOAT16))
    return median_seconds(lambda: session.run_with_iobinding(io), repeats=20)


def _random(place: Place, rows: int, columns: int) -> object:
    """A bfloat16 matrix of numbers between -2 and 2."""
    matrix, count = place.empty([rows, columns], _BFLOAT16), 2 * rows * columns
    bits = np.random.default_rng(0).integers(0, 1 << 16, min(count, _PIECE) // 2, np.uint16) & 0xBFFF
    for first in range(0, count, _PIECE):
        size = min(_PIECE, count - first)
        place.part(matrix, first, [size]).update_inplace(bits.view(np.uint8)[:size])
    return matrix
