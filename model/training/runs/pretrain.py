"""Pre-training from random weights, or from a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..state import TrainProgress
from .run import OnStep, RunOptions, new_model, open_model, train_model


@dataclass(frozen=True, kw_only=True)
class PretrainOptions(RunOptions):
    """Pre-training.

    Attributes:
        checkpoint: directory with configuration, tokenizer, image processor and, unless fresh, weights.
        fresh: begin with random weights instead of the checkpoint's.
    """

    checkpoint: Path
    fresh: bool = False


def pretrain(options: PretrainOptions, on_step: OnStep | None = None) -> TrainProgress:
    """Train a model on next tokens, text and pictures fused from the first layer."""
    if not options.fresh:
        return train_model(open_model(options.checkpoint), options, options.checkpoint, on_step=on_step)
    return train_model(new_model(options.checkpoint, options.train.seed), options, options.checkpoint, on_step=on_step)
