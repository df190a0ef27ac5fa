"""What a step minimises: next tokens, or a teacher's distribution over them as well."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from .data import IGNORED, Batch
from .distill import DenseTargets, DistillationLoss, RecentTargets, Teacher


class Objective(Protocol):
    """A loss and its parts."""

    def __call__(self, model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, float]]:
        """The sum over a batch's labelled tokens of what is minimised, and parts to be logged."""


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """Logits [B, T, V] of a batch, pictures fused in and documents kept apart."""
    logits_BTV: Tensor = model(batch.input_ids_BT, batch.pixels_NCHW, batch.document_BT)
    return logits_BTV


def labelled(batch: Batch) -> int:
    """Tokens of a batch whose successor is learned."""
    return int((batch.labels_BT != IGNORED).sum())


class NextToken:
    """Cross-entropy of the next token."""

    def __call__(self, model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, float]]:
        """See ``Objective``."""
        return next_token_loss(logits_of(model, batch), batch), {}


class Teach:
    """Next tokens, learned by a teacher whose students take the logits of this very forward pass as their targets.

    Args:
        recent: where the targets are kept for the students.
    """

    def __init__(self, recent: RecentTargets) -> None:
        self._recent = recent

    def __call__(self, model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, float]]:
        """See ``Objective``."""
        logits_BTV = logits_of(model, batch)
        self._recent.keep(batch, DenseTargets(logits_BTV.detach().flatten(0, 1)))
        return next_token_loss(logits_BTV, batch), {}


def next_token_loss(logits_BTV: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy summed over the labelled tokens, nats."""
    logits_NV = logits_BTV.flatten(0, 1).float()
    return functional.cross_entropy(logits_NV, batch.labels_BT.flatten(), ignore_index=IGNORED, reduction="sum")


@torch.no_grad()
def held_out_loss(model: nn.Module, batches: list[Batch]) -> float:
    """Mean cross-entropy per labelled token, nats."""
    was_training = model.training
    model.eval()
    total = sum(float(NextToken()(model, batch, 0)[0]) for batch in batches)
    model.train(was_training)
    return total / max(1, sum(labelled(batch) for batch in batches))


class Distil:
    """A teacher's distribution and the label, weighted token by token (``distill/loss.py``).

    Args:
        teacher: gives targets for a batch.
        loss: the weighted sum.
    """

    def __init__(self, teacher: Teacher, loss: DistillationLoss) -> None:
        self.teacher, self.loss = teacher, loss

    def __call__(self, model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, float]]:
        """See ``Objective``."""
        targets = self.teacher.targets(batch)
        return self.loss(logits_of(model, batch), targets, batch.labels_BT, step=step, reduction="sum")
