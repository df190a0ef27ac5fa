"""What a format does to a weight, found by rounding a few of its output channels to it as a build does.

    relative error = tr((W - Q)ᵀ H (W - Q)) / tr(Wᵀ H W)      of the product on the data, H = XᵀX of its inputs

With GPTQ, H is also what the codes are chosen by.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ..model.checkpoint.rotated import power_of_two_in
from ..model.config.names import Shape
from ..model.quantization.calibration_file import CalibrationFile
from ..model.quantization.formats import BlockFormat, ChannelFormat, Format
from ..model.quantization.packed_sizes import INPUT_BLOCK, filled
from ..model.quantization.recipes import EMBEDDING, HEAD
from .passes.quantize._hessians import hessian_of, hessian_of_tied_head
from .passes.quantize.rotate_hidden import LARGEST_BLOCK, SMALLEST_BLOCK, BlockRotated
from .weights.block import BlockRounder, Hessian, filled_up, inverse_cholesky_of
from .weights.channel import ZERO, round_channels
from .weights.stream import Weight, channels_of

CHANNELS = 64
"""Output channels of a matrix that speak for all of them."""
EXPERTS = 2
"""Experts of a layer that speak for all of them."""


class RoundingError(NamedTuple):
    """What a format does to a weight.

    Attributes:
        relative_error: of the product.
        mean_square: of what is added to an output of the product, for an input behind a norm.
    """

    relative_error: float
    mean_square: float


@dataclass(frozen=True)
class RoundingSampler:
    """Compares formats.

    Attributes:
        calibration: Hessians in the basis of the build, and the checkpoint in it.
        layouts: formats, the first in blocks.
        rotated: hidden channels are rotated before they are quantised (``passes/quantize/rotate_hidden.py``).
    """

    calibration: CalibrationFile
    layouts: tuple[Format | None, ...]
    rotated: bool

    def errors(self, name: str, shape: Shape) -> list[RoundingError]:
        """Of a stored tensor, by format; of experts the mean over some of a layer."""
        source = self.calibration.source
        assert source is not None, "calibration_for gives every build its source"
        if len(shape) == 2:
            weights = [Weight(source, name, shape).transposed()]
        else:
            weights = [Weight(source, name, shape[1:], expert=expert) for expert in range(min(EXPERTS, shape[0]))]
        found = np.mean([self._of(self._as_built(weight)) for weight in weights], axis=0)
        return [RoundingError(*each) for each in found.tolist()]

    def errors_of_tied_head(self, shape: Shape) -> list[RoundingError]:
        """Of a head that is the table too, by format; relative is the error of the table's rows as they are."""
        source = self.calibration.source
        assert source is not None, "calibration_for gives every build its source"
        table = Weight(source, EMBEDDING, shape).transposed()
        hessian_DD = _read(hessian_of_tied_head(self._first, self.calibration))
        rows_ND, differences = self._differences(table, hessian_DD)
        per_token = _per_token(_read(partial(self.calibration.hessian, HEAD)))
        return [RoundingError(float(np.square(each).sum() / np.square(rows_ND).sum()),
                              _energy(each, hessian_DD) / len(rows_ND) * per_token) for each in differences]

    def _as_built(self, weight: Weight) -> ir.TensorProtocol:
        block = power_of_two_in(int(weight.shape.numpy()[0]), LARGEST_BLOCK)
        spread = self.rotated and "down_proj" in weight.stored and block >= SMALLEST_BLOCK
        return BlockRotated(weight, block) if spread else weight

    def _of(self, weight: ir.TensorProtocol) -> list[RoundingError]:
        hessian_KK = _read(hessian_of(weight, self._first, self.calibration))
        rows_NK, differences = self._differences(weight, hessian_KK)
        energy, per_token = _energy(rows_NK, hessian_KK), _per_token(hessian_KK)
        return [RoundingError(error / energy, error / len(rows_NK) * per_token)
                for error in (_energy(each, hessian_KK) for each in differences)]

    @property
    def _first(self) -> BlockFormat:
        first = self.layouts[0]
        assert isinstance(first, BlockFormat)
        return first

    def _differences(self, weight: ir.TensorProtocol, hessian_KK: Tensor) -> tuple[np.ndarray, list[np.ndarray]]:
        """Some output channels of a weight [n, K], and what every format changes in them."""
        rows_NK = _sample(weight)
        factor_KK = inverse_cholesky_of(weight, lambda: hessian_KK, filled(len(hessian_KK), INPUT_BLOCK))
        return rows_NK, [_rounded(rows_NK, layout, factor_KK) - rows_NK for layout in self.layouts]


def _read(hessian: Hessian | None) -> Tensor:
    found = hessian() if hessian is not None else None
    assert found is not None, "a calibration without it was refused"
    return found


def _per_token(hessian_KK: Tensor) -> float:
    """1 / tokens, where a token's inputs have a mean square of 1, as behind a norm: the trace counts tokens times K."""
    return len(hessian_KK) / max(float(hessian_KK.trace()), 1e-30)


def _sample(weight: ir.TensorProtocol) -> np.ndarray:
    """Output channels spread over the whole matrix, [n, K]."""
    step = max(1, int(weight.shape.numpy()[1]) // CHANNELS)
    rows, first = [], 0
    for some_NK in channels_of(weight):
        rows.append(some_NK[-first % step :: step])
        first += len(some_NK)
    return np.concatenate(rows)


def _rounded(rows_NK: np.ndarray, layout: Format | None, factor_KK: Tensor | None) -> np.ndarray:
    """Values of output channels after rounding; the factor is of as many inputs as every format fills up."""
    if isinstance(layout, ChannelFormat):
        codes_NK, scales_N = round_channels(rows_NK, factor_KK, centered=layout.centered)
        return (codes_NK.astype(np.float32) - ZERO) * scales_N[:, None]
    assert isinstance(layout, BlockFormat)
    padded = filled_up(rows_NK, INPUT_BLOCK)
    return BlockRounder(layout).quantize(padded, factor_KK).values().reshape(padded.shape)[:, : rows_NK.shape[1]]


def _energy(rows_NK: np.ndarray, hessian_KK: Tensor) -> float:
    """What rows give on the data: tr(R H Rᵀ)."""
    rows = torch.from_numpy(rows_NK)
    return max(float(((rows @ hessian_KK) * rows).sum(dtype=torch.float64)), 1e-30)
