"""Checkpoints in and out: Hugging Face and Meta layouts, read lazily under canonical names."""

from __future__ import annotations

from pathlib import Path

from ..config import read_config
from ..config.names import expected_tensors
from ..config.read import CALF, checkpoint_directory
from .base import Checkpoint, TensorInfo
from .huggingface import open_huggingface
from .meta.checkpoint import open_meta
from .save import save_checkpoint

__all__ = [
    "CALF", "Checkpoint", "TensorInfo", "checkpoint_directory", "expected_tensors", "open_checkpoint",
    "save_checkpoint",
]


def open_checkpoint(directory: str | Path) -> Checkpoint:
    """Open a checkpoint directory: ``config.json`` with safetensors, or ``params.json`` with ``consolidated.*.pth``.

    Names and shapes of all tensors are checked against the configuration; no weights are read.

    Args:
        directory: or the name of one, see ``checkpoint_directory``.

    Raises:
        HerdError: what is missing, damaged or does not fit, in one line.
    """
    directory = checkpoint_directory(directory)
    config = read_config(directory)
    opener = open_huggingface if (directory / "config.json").is_file() else open_meta
    return opener(directory, config)
