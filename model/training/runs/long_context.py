"""Mid-training that raises the context: longer rows, a flat and low learning rate, RoPE scaled as Scout's.

Llama 4's layers without RoPE carry the distance beyond a chunk; what has to be learned is their attention over more
keys. So this is short: the configuration's context and, for models that were trained short, the factor of RoPE change,
and training goes on with rows of the new length.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from ....errors import HerdError
from ...checkpoint import checkpoint_directory
from ...config import RopeScaling
from ...llama4.model import Llama4
from ..optim import OptimizerOptions
from ..state import TrainProgress
from .run import OnStep, RunOptions, train_model
from .start import open_model


@dataclass(frozen=True, kw_only=True)
class LongContextOptions(RunOptions):
    """Mid-training.

    Attributes:
        checkpoint: directory of the model, or calf.
        context: tokens that the model is to hold, more than now.
        rope_factor: divides the frequency of slow rotations, 1 for none; Scout has 16.
    """

    checkpoint: Path
    context: int
    rope_factor: float = 1.0
    optimizer: OptimizerOptions = field(
        default_factory=lambda: OptimizerOptions(learning_rate=3e-4, schedule="wsd", warmup=20))


def long_context(options: LongContextOptions, on_step: OnStep | None = None) -> TrainProgress:
    """Raise the context of a model.

    Raises:
        HerdError: the context is not longer than it was, or rows are longer than the context.
    """
    files = checkpoint_directory(options.checkpoint)
    short = open_model(files)
    text = short.config.text
    if options.context <= text.max_position_embeddings:
        raise HerdError(f"the context is {text.max_position_embeddings} already, {options.context} is not more: give a "
                        "longer one")
    if options.seq_len > options.context:
        raise HerdError(f"rows of {options.seq_len} tokens do not fit a context of {options.context}: shorten them")
    scaling = text.rope_scaling
    if options.rope_factor != 1.0:
        scaling = RopeScaling(factor=options.rope_factor,
                              original_max_position_embeddings=text.max_position_embeddings)
    config = replace(short.config, text=replace(text, max_position_embeddings=options.context, rope_scaling=scaling))
    model = Llama4(config)
    model.load_state_dict(short.state_dict())
    return train_model(model, options, files, on_step=on_step)
