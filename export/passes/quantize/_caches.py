"""What both passes that store keys and values in 8 bits share."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes import InPlacePass

from ....model.quantization.calibration_file import CalibrationFile


class CachesPass(InPlacePass):
    """Stores caches in an 8-bit type, with one scale for keys and one for values per layer.

    Attributes:
        dtype: the type of the caches.
        calibration: the largest magnitudes of keys and values.
    """

    dtype: ClassVar[ir.DataType]

    def __init__(self, calibration: CalibrationFile) -> None:
        super().__init__()
        self.calibration = calibration

    def set_type(self, *values: ir.Value) -> None:
        """Give cache inputs and outputs the 8-bit type."""
        for value in values:
            value.type = ir.TensorType(self.dtype)


def layer_of(cache: ir.Value) -> int:
    """The layer of a cache input or output, which the interface of decoder graphs calls ``past.{layer}.key``."""
    return int(str(cache.name).split(".")[1])
