"""Passes: small graph rewrites, onnx-ir in, onnx-ir out. One class, one file, one test file each."""

from .compute_in import ComputeIn
from .fold_weight_transposes import FoldWeightTransposes
from .join_matmuls import JoinMatMuls
from .keep_stage import KeepStage
from .lower_cached_attention import LowerCachedAttention
from .lower_collectives import LowerCollectives
from .lower_experts_dense import LowerExpertsDense
from .lower_experts_fused import LowerExpertsFused
from .lower_experts_gathered import LowerExpertsGathered
from .lower_experts_unrolled import LowerExpertsUnrolled
from .lower_explicit_attention import LowerExplicitAttention
from .lower_routed_experts import LowerRoutedExperts
from .quantize_caches import QuantizeCaches
from .quantize_caches_fp8 import QuantizeCachesFp8
from .quantize_fp8 import QuantizeFp8
from .quantize_matmuls import QuantizeMatMuls
from .rotate_hidden import RotateHidden
from .split_width import SplitWidth

__all__ = [
    "ComputeIn", "FoldWeightTransposes", "JoinMatMuls", "KeepStage", "LowerCachedAttention", "LowerCollectives",
    "LowerExpertsDense", "LowerExpertsFused", "LowerExpertsGathered", "LowerExpertsUnrolled", "LowerExplicitAttention",
    "LowerRoutedExperts", "QuantizeCaches", "QuantizeCachesFp8", "QuantizeFp8", "QuantizeMatMuls", "RotateHidden",
    "SplitWidth",
]
