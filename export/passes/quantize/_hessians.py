"""The Hessian by which a weight is rounded."""

from __future__ import annotations

import onnx_ir as ir
from torch import Tensor

from ....errors import HerdError
from ....model.quantization.calibration_file import CalibrationFile
from ....model.quantization.formats import BlockFormat, ChannelFormat
from ...weights.origin import origin_of
from .rotate_hidden import BlockRotated


def hessian_of(
    weight: ir.TensorProtocol, layout: BlockFormat | ChannelFormat, calibration: CalibrationFile | None
) -> Tensor | None:
    """The Hessian of a weight's input, None for rounding to nearest.

    Raises:
        HerdError: the calibration does not have it, and the weight is stored in 4 bits.
    """
    if calibration is None or isinstance(layout, ChannelFormat):
        return None
    origin = origin_of(weight)
    hessian_KK = calibration.hessian(origin.name, origin.expert)
    if layout.bits == 4 and hessian_KK is None:
        raise HerdError(f"{calibration.path} says nothing of {origin.name}, which is stored in 4 bits: write "
                        "it again with `herdgraph calibrate`")
    if hessian_KK is not None and isinstance(weight, BlockRotated):
        return weight.rotated_hessian(hessian_KK)
    return hessian_KK
