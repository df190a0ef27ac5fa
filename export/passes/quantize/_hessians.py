"""The Hessian by which a weight is rounded, read when it is rounded: those of all weights may exceed the memory."""

from __future__ import annotations

from functools import partial

import onnx_ir as ir
from torch import Tensor

from ....errors import HerdError
from ....model.checkpoint.rotated import RotatedCheckpoint
from ....model.quantization.calibration_file import CalibrationFile
from ....model.quantization.formats import BlockFormat, ChannelFormat
from ....model.quantization.recipes import HEAD
from ...weights.block import Hessian
from ...weights.origin import origin_of
from .rotate_hidden import BlockRotated


def hessian_of(
    weight: ir.TensorProtocol, layout: BlockFormat | ChannelFormat, calibration: CalibrationFile | None
) -> Hessian | None:
    """What reads the Hessian of a weight's input, None for rounding to nearest.

    Raises:
        HerdError: the calibration does not have it, and the weight is stored in less than 8 bits.
    """
    if calibration is None:
        return None
    return partial(_read, weight, calibration) if _known(origin_of(weight).name, layout, calibration) else None


def hessian_of_tied_head(
    layout: BlockFormat | ChannelFormat, calibration: CalibrationFile | None
) -> Hessian | None:
    """As ``hessian_of``, for a table that is the head too: of what is multiplied with it (``native/tied_table.py``)."""
    if calibration is None:
        return None
    return partial(_read_tied, calibration) if _known(HEAD, layout, calibration) else None


def _known(name: str, layout: BlockFormat | ChannelFormat, calibration: CalibrationFile) -> bool:
    if calibration.knows_hessian(name):
        return True
    if isinstance(layout, BlockFormat) and layout.bits < 8:
        raise HerdError(f"{calibration.path} says nothing of {name}, which is stored in {layout.bits} bits: write it "
                        "again with `herdgraph calibrate`")
    return False


def _read(weight: ir.TensorProtocol, calibration: CalibrationFile) -> Tensor:
    origin = origin_of(weight)
    hessian_KK = calibration.hessian(origin.name, origin.expert)
    assert hessian_KK is not None, "asked for only where the calibration knows it"
    return weight.rotated_hessian(hessian_KK) if isinstance(weight, BlockRotated) else hessian_KK


def _read_tied(calibration: CalibrationFile) -> Tensor:
    """M N M^T, where the logits are those of M n, and N is of n."""
    hessian_DD = calibration.hessian(HEAD)
    assert hessian_DD is not None, "asked for only where the calibration knows it"
    if not isinstance(calibration.source, RotatedCheckpoint):
        return hessian_DD
    mixing_DD = calibration.source.tied_head_inputs()
    return mixing_DD @ hessian_DD @ mixing_DD.T
