"""Passes: small graph rewrites, onnx-ir in, onnx-ir out. One class, one file, one test file each."""

from .fold_weight_transposes import FoldWeightTransposes
from .join_matmuls import JoinMatMuls
from .lower_cached_attention import LowerCachedAttention
from .lower_routed_experts import LowerRoutedExperts
from .quantize_caches import QuantizeCaches
from .quantize_matmuls import QuantizeMatMuls
from .rotate_hidden import RotateHidden

__all__ = [
    "FoldWeightTransposes", "JoinMatMuls", "LowerCachedAttention", "LowerRoutedExperts", "QuantizeCaches",
    "QuantizeMatMuls", "RotateHidden",
]
