"""An image tower learns to see: pictures drawn to their names, before early fusion (``contrastive.py``)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ....errors import HerdError
from ..contrastive import ContrastiveLoss
from ..parallel.ranks import Ranks
from ..state import TrainProgress
from .run import OnStep, RunOptions, train_model
from .start import start_of


@dataclass(frozen=True, kw_only=True)
class AlignOptions(RunOptions):
    """Alignment of an image tower.

    Attributes:
        checkpoint: what to begin with: a directory with configuration, tokenizer, image processor and, unless fresh,
            weights; or calf; or, for random weights, a config.json or one of tiny, tiny-text, scout, maverick.
        fresh: begin with random weights instead of the checkpoint's.
    """

    checkpoint: Path
    fresh: bool = False


def align(options: AlignOptions, on_step: OnStep | None = None) -> TrainProgress:
    """Train tower, projector and embeddings on samples of one picture and its name; the decoder stays as it is.

    Raises:
        HerdError: the model has no image tower, or several processes were started: a contrast needs one whole batch.
    """
    start = start_of(options.checkpoint, options.output, fresh=options.fresh)
    model = start.model(options.train.seed)
    if model.vision is None:
        raise HerdError(f"{start.files} is a model without an image tower: there is nothing to align")
    if Ranks.from_environment().count > 1:
        raise HerdError("alignment runs in one process, several were started: start it without torchrun")
    return train_model(model, options, start.files, objective=ContrastiveLoss(), on_step=on_step)
