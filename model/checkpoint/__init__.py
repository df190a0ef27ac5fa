"""Checkpoints in and out: Hugging Face and Meta layouts, read lazily under canonical names."""

from __future__ import annotations

from pathlib import Path

from ..config import read_config
from ..config.names import expected_tensors
from .base import Checkpoint, TensorInfo
from .huggingface import open_huggingface
from .meta.checkpoint import open_meta
from .save import save_checkpoint

__all__ = ["Checkpoint", "TensorInfo", "expected_tensors", "open_checkpoint", "save_checkpoint"]

CALF = Path(__file__).parents[2] / "examples" / "calf" / "checkpoint"
"""A small model that the repository carries, and the wheel does not."""


def open_checkpoint(directory: str | Path) -> Checkpoint:
    """Open a checkpoint directory: ``config.json`` with safetensors, or ``params.json`` with ``consolidated.*.pth``.

    The name ``calf``, where no directory is called so, opens the model that the repository carries.

    Names and shapes of all tensors are checked against the configuration; no weights are read.

    Raises:
        HerdError: what is missing, damaged or does not fit, in one line.
    """
    directory = Path(directory)
    if directory == Path("calf") and CALF.exists() and not directory.exists():
        directory = CALF
    config = read_config(directory)
    opener = open_huggingface if (directory / "config.json").is_file() else open_meta
    return opener(directory, config)
