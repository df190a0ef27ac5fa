"""Passes: small graph rewrites, onnx-ir in, onnx-ir out. One class, one file, one test file each."""

from .attention.contrib_paged import LowerPagedContrib
from .attention.explicit_mask import LowerExplicitAttention
from .attention.group_query import LowerCachedAttention
from .attention.pack_tokens import PackTokens
from .attention.paged import LowerPagedAttention
from .experts.contrib import LowerExpertsContrib
from .experts.dense import LowerExpertsDense
from .experts.fused import LowerExpertsFused
from .experts.gathered import LowerExpertsGathered
from .experts.grouped_if import LowerRoutedExperts
from .experts.unrolled import LowerExpertsUnrolled
from .layout.best_token import AddBestToken
from .layout.compute_in import ComputeIn
from .layout.fold_weight_transposes import FoldWeightTransposes
from .layout.join_matmuls import JoinMatMuls
from .layout.reshape_rows import ReshapeRows
from .layout.scale_by_excess import ScaleByExcess
from .layout.skip_norms import JoinResidualNorms
from .layout.tidy import Tidy
from .native.full_attention import LowerFullAttention
from .native.mixture import LowerMixtures
from .native.project import LowerProjects
from .native.tied_table import LowerTiedTable
from .quantize.fp8 import QuantizeFp8
from .quantize.kv_fp8 import QuantizeCachesFp8
from .quantize.kv_int8 import QuantizeCaches
from .quantize.matmuls import QuantizeMatMuls
from .quantize.rotate_hidden import RotateHidden
from .quantize.table import QuantizeTable
from .shard.keep_stage import KeepStage
from .shard.lower_collectives import LowerCollectives
from .shard.split_width import SplitWidth

__all__ = [
    "AddBestToken", "ComputeIn", "FoldWeightTransposes", "JoinMatMuls", "JoinResidualNorms", "KeepStage",
    "LowerCachedAttention", "LowerCollectives", "LowerExpertsContrib", "LowerExpertsDense", "LowerExpertsFused",
    "LowerExpertsGathered", "LowerExpertsUnrolled", "LowerExplicitAttention", "LowerFullAttention", "LowerMixtures",
    "LowerPagedAttention", "LowerPagedContrib", "LowerProjects", "LowerRoutedExperts", "LowerTiedTable", "PackTokens",
    "QuantizeCaches", "QuantizeCachesFp8", "QuantizeFp8", "QuantizeMatMuls", "QuantizeTable", "ReshapeRows",
    "RotateHidden", "ScaleByExcess", "SplitWidth", "Tidy",
]
