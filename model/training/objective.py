"""What a step minimises: next tokens, or a teacher's distribution over them as well."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from .data import IGNORED, Batch
from .distill import DistillationLoss, Teacher


class Objective(Protocol):
    """A loss and its parts."""

    def __call__(self, model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, float]]:
        """The sum over a batch's labelled tokens of what is minimised, and parts to be logged."""

    def state_dict(self) -> dict[str, Any]:
        """What it has learned, as plain numbers."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave."""


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """Logits [B, T, V] of a batch, pictures fused in and documents kept apart."""
    logits_BTV: Tensor = model(batch.input_ids_BT, batch.pixels_NCHW, batch.document_BT)
    return logits_BTV


def labelled(batch: Batch) -> int:
    """Tokens of a batch whose successor is learned."""
    return int((batch.labels_BT != IGNORED).sum())


class NextToken:
    """Cross-entropy of the next token; it learns nothing itself."""

    def state_dict(self) -> dict[str, Any]:
        """See ``Objective``."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See ``Objective``."""

    def __call__(self, model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, float]]:
        """See ``Objective``."""
        logits_NV = logits_of(model, batch).flatten(0, 1).float()
        loss = functional.cross_entropy(logits_NV, batch.labels_BT.flatten(), ignore_index=IGNORED, reduction="sum")
        return loss, {}


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

    def state_dict(self) -> dict[str, Any]:
        """See ``Objective``."""
        return self.loss.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See ``Objective``."""
        self.loss.load_state_dict(state)
