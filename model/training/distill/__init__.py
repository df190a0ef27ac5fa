"""Distillation: divergences, weightings, their loss, teachers, and targets kept on disk.

    loss = DistillationLoss(ForwardKL(), dynamic(steps=1000), temperature=2.0)
    teacher = ModuleTeacher(large, logits_of)
    value, parts = loss(student_logits, teacher.targets(batch), batch.labels_BT, step=step)

Meta never published how Llama 4 was distilled; the weighting ``dynamic`` is herdgraph's own.
"""

from __future__ import annotations

from .balance import LossRatioBalance
from .cache import TargetCache
from .cache_format import CacheSpec
from .cache_writer import CacheWriter, keep_targets
from .divergences import DIVERGENCES, Divergence, ForwardKL, JensenShannon, ReverseKL, SkewKL
from .documents import Document, documents
from .identity import require_tokenizer, tokenizer_hash
from .loss import DistillationLoss, Projection
from .sparsify import Sample, Sparsifier, TopK
from .targets import DenseTargets, SampledTargets, SparseTargets, Targets, TopKTargets
from .teachers import CachedTeacher, EngineTeacher, ModuleTeacher, Teacher
from .weightings import (
    Combined,
    Fixed,
    Schedule,
    Signals,
    TeacherCertainty,
    TeacherConfidence,
    WeightedSoftLabels,
    Weighting,
    dynamic,
)

__all__ = [
    "DIVERGENCES", "CacheSpec", "CacheWriter", "CachedTeacher", "Combined", "DenseTargets", "DistillationLoss",
    "Divergence", "Document", "EngineTeacher", "Fixed", "ForwardKL", "JensenShannon", "LossRatioBalance",
    "ModuleTeacher", "Projection", "ReverseKL", "Sample", "SampledTargets", "Schedule", "Signals", "SkewKL",
    "SparseTargets", "Sparsifier", "TargetCache", "Targets", "Teacher", "TeacherCertainty", "TeacherConfidence", "TopK",
    "TopKTargets", "WeightedSoftLabels", "Weighting", "documents", "dynamic", "keep_targets", "require_tokenizer",
    "tokenizer_hash",
]
