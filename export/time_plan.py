"""How long a build will take, found before it starts: rates of this machine on a few rows of every format.

Of the tensors that are stored in a format the one with the most elements stands for all. A sample as wide as it, of
random numbers, goes the way that weights will go, from what is stored to codes, on as many cores as the build will use:

    seconds = capture + elements · rate of the format / cores + rounding by Hessians / cores
              + bytes read · rate + bytes written · rate

Rounding by a Hessian [K, K] takes K^3 for its factor and a + b K per element; the rates are found on small ones.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional

from ..files import sha256_of
from ..model.checkpoint import Checkpoint
from ..model.checkpoint.rotated import RotatedCheckpoint
from ..model.config import HerdConfig
from ..model.config.names import Shape, expected_tensors
from ..model.quantization.formats import BlockFormat, ChannelFormat, Format, Fp8Format
from ..model.quantization.packed_sizes import INPUT_BLOCK, can_pack, filled
from ..model.quantization.recipes import is_rounded_by_hessian
from ..runtimes.bundle.blocks import write_block_hashes
from ..runtimes.machine.host import this_host
from .job import Job
from .weights.block import BlockCodes, BlockRounder
from .weights.channel import ChannelCodes, ChannelRounder
from .weights.fp8 import E4m3Rounder, Fp8Codes
from .weights.gptq import Rounder, gptq_quantize, inverse_hessian_cholesky
from .weights.packed import PackedMatrix
from .weights.parallel import in_parallel, workers
from .weights.stream import Weight

CAPTURE_SECONDS, LAYER_SECONDS = 4.0, 0.6
"""What a graph without weights takes on a server core of 2021: a few per cent of a large build."""
_Result = TypeVar("_Result")
_SAMPLE, _SAMPLE_BYTES = 1 << 22, 64 << 20
"""Elements and bytes: smaller samples are mostly what a part of a matrix costs by itself."""
_INPUTS, _ROWS = 1536, 1536
"""Inputs of the larger of two Hessians that rates are found on, and rows that are rounded by them."""


def expected_seconds(job: Job, output: Path, bundle_bytes: int) -> float:
    """Seconds that a build will take; finding it out takes a few.

    Args:
        job: what is built of what.
        output: where the bundle will be.
        bundle_bytes: how large it will be.
    """
    largest: dict[Format | None, tuple[str, Shape]] = {}
    elements: dict[Format | None, int] = {}
    for name, shape in expected_tensors(job.config).items():
        layout = job.recipe.layout_of_tensor(name, shape)
        elements[layout] = elements.get(layout, 0) + math.prod(shape)
        if layout not in largest or math.prod(shape) > math.prod(largest[layout][1]):
            largest[layout] = name, shape
    in_cores = sum(count * _seconds_per_element(job, *largest[layout], layout) for layout, count in elements.items())
    if job.calibration is not None and job.calibration.has_hessians:
        in_cores += _by_hessians(job)
    config = job.config
    layers = config.text.num_layers + (config.vision.num_layers if config.vision else 0)
    written = bundle_bytes * _written_seconds_per_byte(output)
    return CAPTURE_SECONDS + LAYER_SECONDS * layers + in_cores / workers() + _reading(job.checkpoint) + written


@dataclass(frozen=True)
class _Random:
    """Reads the same random numbers in the place of every matrix of a checkpoint, and ones in that of norms."""

    config: HerdConfig
    values: Tensor

    def read(self, name: str, index: int | slice | None = None) -> Tensor:
        if "norm" in name:
            return torch.ones(self.config.text.hidden_size, dtype=torch.bfloat16)
        return self.values if index is None else self.values[index]


def _seconds_per_element(job: Job, name: str, shape: Shape, layout: Format | None) -> float:
    """Seconds of one core while all are busy."""
    shape = _sample_shape(name, shape, job.config.text.head_dim)
    source = _Random(job.checkpoint.config, torch.empty(shape, dtype=torch.bfloat16).normal_())
    reader = RotatedCheckpoint(source) if job.recipe.rotated else source  # type: ignore[arg-type]

    def make() -> None:
        weight = Weight(reader, name, shape)
        _stored(job, weight.of_expert(0) if len(shape) == 3 else weight.transposed(), layout).tobytes()

    make()
    started = time.perf_counter()
    for _ in in_parallel([make] * workers()):
        pass
    return (time.perf_counter() - started) / math.prod(shape)


def _sample_shape(name: str, shape: Shape, head_dim: int) -> Shape:
    """Fewer outputs, or fewer inputs where outputs are mixed with each other when the residual stream is rotated.

    What belongs to a head stays together: values are mixed within it.
    """
    if len(shape) == 1:
        return shape
    *first, rows, columns = shape
    whole = math.lcm(64, head_dim)
    if name.endswith(("o_proj.weight", "down_proj.weight", "linear_1.weight", "gate_up_proj")):
        return (*(1 for _ in first), rows, _few(columns, rows, whole))
    return (*(1 for _ in first), _few(rows, columns, whole), columns)


def _few(count: int, others: int, multiple: int) -> int:
    return min(count, max(multiple, _SAMPLE // others // multiple * multiple))


def _stored(job: Job, weight: Weight, layout: Format | None) -> ir.TensorProtocol:
    """A matrix as the target stores it."""
    if job.target.packs_weights and not job.recipe.fp8 and can_pack(layout):
        return PackedMatrix(weight, layout)  # type: ignore[arg-type]
    if isinstance(layout, BlockFormat):
        return BlockCodes(weight, layout)
    if isinstance(layout, ChannelFormat):
        return ChannelCodes(weight)
    return Fp8Codes(weight) if isinstance(layout, Fp8Format) else weight


def _by_hessians(job: Job) -> float:
    """Core-seconds that rounding by Hessians takes."""
    shapes: dict[Format, list[Shape]] = {}
    for name, shape in expected_tensors(job.config).items():
        layout = job.recipe.layout_of_tensor(name, shape)
        if layout is not None and is_rounded_by_hessian(name):
            shapes.setdefault(layout, []).append(shape)
    return sum(_seconds_by_hessians(each, layout) for layout, each in shapes.items())


def _seconds_by_hessians(shapes: Sequence[Shape], layout: Format) -> float:
    # Inputs are the second axis of a stack of experts, and of any other matrix.
    matrices = [(shape[0] if len(shape) == 3 else 1, shape[1], math.prod(shape)) for shape in shapes]
    size = min(_INPUTS, max(inputs for _, inputs, _ in matrices))
    (_, small), (factor, large) = _hessian_seconds(size // 3, layout), _hessian_seconds(size, layout)
    slope = max(0.0, large - small) / (size - size // 3)
    return sum(count * factor * (inputs / size) ** 3 + elements * (large + slope * (inputs - size))
               for count, inputs, elements in matrices)


def _hessian_seconds(inputs: int, layout: Format) -> tuple[float, float]:
    """Seconds of a factor, and of an element that is rounded by it, on one core."""
    hessian_KK = torch.eye(inputs).add_(1 / inputs)
    rounder = _rounder(layout)
    weight_KN = torch.empty(filled(inputs, max(INPUT_BLOCK, rounder.block)), _ROWS).normal_()

    def measure() -> tuple[float, float]:
        rest = len(weight_KN) - inputs
        factor_KK, seconds = _timed(lambda: inverse_hessian_cholesky(functional.pad(hessian_KK, (0, rest) * 2)))
        _, rounding = _timed(lambda: gptq_quantize(weight_KN, factor_KK, rounder))
        return seconds, rounding / weight_KN.numel()

    return next(in_parallel([measure]))


def _rounder(layout: Format) -> Rounder:
    if isinstance(layout, BlockFormat):
        return BlockRounder(layout)
    scales_N = torch.full((_ROWS,), 0.02)
    return E4m3Rounder(scales_N) if isinstance(layout, Fp8Format) else ChannelRounder(scales_N)


def _timed(what: Callable[[], _Result]) -> tuple[_Result, float]:
    started = time.perf_counter()
    return what(), time.perf_counter() - started


def _reading(checkpoint: Checkpoint) -> float:
    """Seconds to read and check all weights from the disk, and again: on all cores from memory, if they fit into it."""
    name = max(checkpoint.tensors, key=lambda name: math.prod(checkpoint.tensors[name].shape))
    info = checkpoint.tensors[name]
    row = math.prod(info.shape[1:]) * info.dtype.itemsize
    total = sum(math.prod(each.shape) * each.dtype.itemsize for each in checkpoint.tensors.values())

    def read() -> Tensor:
        return checkpoint.read(name, slice(0, max(1, _SAMPLE_BYTES // row)))

    part, first = _timed(read)
    again = _timed(read)[1] / workers() if total < this_host().available else first
    return total * (first + again) / part.nbytes


def _written_seconds_per_byte(output: Path) -> float:
    """Seconds to write and to hash a byte beside the output."""
    parent = next(path for path in output.absolute().parents if path.is_dir())
    try:
        with tempfile.TemporaryDirectory(dir=parent, prefix=".herdgraph-speed-") as name:
            data = Path(name) / "sample"

            def write() -> None:
                data.write_bytes(bytes(_SAMPLE_BYTES))
                write_block_hashes(data)
                sha256_of(data)

            return _timed(write)[1] / _SAMPLE_BYTES
    except OSError:
        return 0.0  # the build itself will say what is wrong with the output
