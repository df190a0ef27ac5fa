"""Distillation: a divergence, weightings, their loss, teachers, and targets kept on disk.

    loss, teacher = DistillationLoss(), ModuleTeacher(large, logits_of)
    value, parts = loss(student_logits, teacher.targets(batch), batch.labels_BT)

Meta never published how Llama 4 was distilled; the weighting ``Responsibility`` is herdgraph's own.
"""

from __future__ import annotations

from .cache import TargetCache
from .cache_format import CacheSpec
from .cache_writer import CacheWriter, keep_targets
from .divergence import forward_kl
from .documents import Document, documents
from .identity import require_tokenizer, tokenizer_hash
from .loss import DistillationLoss, Projection
from .sharing import RecentTargets, SharedTeacher
from .sparsify import TopK
from .targets import DenseTargets, Targets, TopKTargets
from .teachers import CachedTeacher, EngineTeacher, ModuleTeacher, Teacher
from .weightings import Fixed, Responsibility, Schedule, Signals, Weighting

__all__ = [
    "CacheSpec", "CacheWriter", "CachedTeacher", "DenseTargets", "DistillationLoss", "Document", "EngineTeacher",
    "Fixed", "ModuleTeacher", "Projection", "RecentTargets", "Responsibility", "Schedule", "SharedTeacher", "Signals",
    "TargetCache", "Targets", "Teacher", "TopK", "TopKTargets", "Weighting", "documents", "forward_kl", "keep_targets",
    "require_tokenizer", "tokenizer_hash",
]
