"""The distillation loss: a teacher's distribution and the label, weighted token by token.

    L = mean over labelled tokens of   a_t · T² · KL(p_t || q_t) + (1 - a_t) · CE(y_t, q_t)

Shapes: B batch, T tokens of a row, N = B · T, M labelled tokens, V vocabulary, D hidden width.

Two passes over the vocabulary: the first gives KL and CE of every token, on which the weights depend; the backward pass
computes them again, a chunk at a time (``chunks.py``), with the weights held constant.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ....errors import HerdError
from ..data.packing import IGNORED
from .chunks import by_chunks, collect, rows_for
from .divergence import forward_kl
from .targets import DenseTargets, Targets, TeacherStats
from .weightings import Fixed, Signals, Weighting

_HEAD_ROWS = 128
"""Fewest rows in a product with the head: enough to be bound by arithmetic, not by reading weights."""


class Projection(NamedTuple):
    """A student whose logits are never all in memory: hidden states [B, T, D], normalised, and the head [V, D]."""

    hidden_BTD: Tensor
    head_VD: Tensor


@dataclass
class DistillationLoss:
    """See this module's first lines.

    Attributes:
        weighting: gives a_t.
        temperature: T, of both distributions in KL. Cross-entropy is always at 1.
        ignored: label of tokens that do not count.
    """

    weighting: Weighting = field(default_factory=Fixed)
    temperature: float = 1.0
    ignored: int = IGNORED

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise HerdError(f"the temperature is {self.temperature}, it must be above 0")

    def __call__(
        self, student: Tensor | Projection, teacher: Targets | Tensor, labels_BT: Tensor, mask_BT: Tensor | None = None,
        *, step: int = 0, reduction: Literal["mean", "sum"] = "mean",
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss and what it consists of.

        Args:
            student: logits [B, T, V] of any floating type, or what gives them.
            teacher: targets of all B · T tokens, or logits [B, T, V].
            labels_BT: the next token of every token.
            mask_BT: further tokens to leave out (False).
            step: optimizer steps done.
            reduction: over the labelled tokens; ``sum`` for those who divide by the tokens of several batches.

        Returns:
            A float32 scalar, 0 without labelled tokens, and its parts, means over labelled tokens: ``soft`` (T² KL),
            ``hard`` (CE), ``soft_weight`` (a), ``teacher_entropy`` in nats, and ``agreement``, the share of tokens
            where both give the same best id.

        Raises:
            HerdError: another number of tokens or ids, or targets made at another temperature.
        """
        targets = DenseTargets(teacher.flatten(0, -2)) if isinstance(teacher, Tensor) else teacher
        index_M = self._labelled(labels_BT, mask_BT, len(targets))
        targets, labels_N = targets.map(torch.detach), labels_BT.flatten()
        divergence_M, hard_M, top_M = self._compare(student, targets, labels_N, index_M)
        known = knowledge_of(targets, labels_N, index_M)
        weight_M = self.weighting(Signals(known.label_logprob_N, -hard_M.detach(), step)).detach()
        soft_M = self.temperature**2 * divergence_M
        loss = (weight_M * soft_M + (1 - weight_M) * hard_M).sum()
        parts = {"soft": soft_M, "hard": hard_M, "soft_weight": weight_M, "teacher_entropy": known.entropy_N,
                 "agreement": known.top_N == top_M}
        return loss / max(1, len(index_M)) if reduction == "mean" else loss, _means(parts)

    def _labelled(self, labels_BT: Tensor, mask_BT: Tensor | None, targets: int) -> Tensor:
        if labels_BT.numel() != targets:
            raise HerdError(f"the teacher has targets of {targets} tokens, the batch has {labels_BT.numel()}: give "
                            "both the same batch")
        counts_BT = labels_BT != self.ignored
        return (counts_BT if mask_BT is None else counts_BT & mask_BT.bool()).flatten().nonzero()[:, 0]

    def _compare(
        self, student: Tensor | Projection, targets: Targets, labels_N: Tensor, index_M: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Divergence, cross-entropy and the student's best id of each labelled token."""

        def compare(x_mX: Tensor, piece_m: Tensor, *head_VD: Tensor) -> tuple[Tensor, ...]:
            logits_mV = (functional.linear(x_mX, *head_VD) if head_VD else x_mX).float()
            chosen = targets.rows(piece_m)
            hard_m = functional.cross_entropy(logits_mV, labels_N[piece_m], reduction="none")
            return forward_kl(logits_mV, chosen, self.temperature), hard_m, logits_mV.detach().argmax(-1)

        x_BTX, *head_VD = student if isinstance(student, Projection) else (student,)
        rows = rows_for(targets.vocabulary)
        if head_VD:  # the head is read, and its gradient written, once per chunk
            rows = max(rows, _HEAD_ROWS)
        divergence_M, hard_M, top_M = by_chunks(compare, x_BTX.flatten(0, -2), index_M, *head_VD, rows=rows)
        return divergence_M, hard_M, top_M


def knowledge_of(targets: Targets, labels_N: Tensor, index_M: Tensor) -> TeacherStats:
    """What the teacher knows of the chosen tokens."""
    rows = rows_for(targets.vocabulary)
    return TeacherStats(*collect(lambda piece: targets.rows(piece).knowledge(labels_N[piece]), index_M, rows))


def _means(parts: dict[str, Tensor]) -> dict[str, float]:
    sums = torch.stack([part.detach().float().sum() for part in parts.values()])
    count = max(1, *(len(part) for part in parts.values()))
    return dict(zip(parts, (sums / count).tolist(), strict=True))
