"""Pre-training from random weights, or from a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..state import TrainProgress
from .run import OnStep, RunOptions, train_model
from .start import start_of


@dataclass(frozen=True, kw_only=True)
class PretrainOptions(RunOptions):
    """Pre-training.

    Attributes:
        checkpoint: what to begin with: a directory with configuration, tokenizer, image processor and, unless fresh,
            weights; or calf; or, for random weights, a config.json or one of tiny, tiny-text, scout, maverick.
        fresh: begin with random weights instead of the checkpoint's.
    """

    checkpoint: Path
    fresh: bool = False


def pretrain(options: PretrainOptions, on_step: OnStep | None = None) -> TrainProgress:
    """Train a model on next tokens, text and pictures fused from the first layer."""
    start = start_of(options.checkpoint, options.output, fresh=options.fresh)
    return train_model(start.model(options.train.seed), options, start.files, on_step=on_step)
