"""The files that a bundle carries beside the graphs: tokenizer, chat template, generation and picture settings.

A build opens them before it starts, because whoever uses the bundle would get the error of a broken one.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from ..model.checkpoint import Checkpoint
from ..model.processing import check_processor
from ..reading import read_json, read_text


def check_processor_files(checkpoint: Checkpoint) -> None:
    """Open and try everything that will be carried.

    Raises:
        HerdError: a file that is no regular one, too large, not what its name says, or that the runtime cannot use.
    """
    for path in checkpoint.processor_files():
        if path.suffix == ".json":
            read_json(path)
        elif path.suffix == ".jinja":
            read_text(path)
    check_processor(checkpoint.directory, checkpoint.config)


def copy_processor_files(checkpoint: Checkpoint, directory: Path) -> None:
    """Copy what was checked into a directory of a bundle, which is created."""
    directory.mkdir()
    for path in checkpoint.processor_files():
        shutil.copyfile(path, directory / path.name)
