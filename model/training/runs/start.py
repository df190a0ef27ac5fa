"""What a run begins with: a checkpoint and its weights, or a configuration and random ones.

============================  =========================================================================================
a directory                   configuration, tokenizer, image processor and, unless ``fresh``, weights
``calf``                      the small model that the repository carries
a ``.json`` file              a configuration alone: random weights; the tokenizer that lies beside it, or the calf's
``tiny``, ``tiny-text``, ...  a configuration by its name (``model/config/presets.py``): random weights, the calf's
                              tokenizer
============================  =========================================================================================

A configuration that borrows the calf's tokenizer gets the calf's vocabulary as well.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ....errors import HerdError
from ....files import atomic_file, size
from ....reading import read_json
from ...checkpoint import CALF, checkpoint_directory, open_checkpoint
from ...checkpoint.base import PROCESSOR_FILES
from ...config import HerdConfig, from_hf, from_meta, read_config, to_hf
from ...config.parameter_counts import model_size
from ...config.presets import PRESETS, preset
from ...llama4.initialization import initialize
from ...llama4.model import Llama4

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """What a run begins with.

    Attributes:
        files: directory with configuration, tokenizer and image processor.
        fresh: whether the weights are random.
    """

    files: Path
    fresh: bool

    def model(self, seed: int) -> Llama4:
        """The model, in float32.

        Raises:
            HerdError: it cannot be read, or there is no memory for it.
        """
        return new_model(self.files, seed) if self.fresh else open_model(self.files)


def start_of(checkpoint: Path, output: Path, *, fresh: bool) -> Start:
    """What a run begins with, by what was given as its checkpoint.

    Args:
        checkpoint: as in the table above.
        output: of the run; a configuration alone is written into ``start/`` there, together with its tokenizer.
        fresh: begin with random weights, whatever is there.

    Raises:
        HerdError: it is none of them.
    """
    directory = checkpoint_directory(checkpoint)
    if directory.is_file() and directory.suffix == ".json":
        parse = from_meta if directory.name == "params.json" else from_hf
        return _configured(parse(read_json(directory)), directory.parent, output / "start")
    if not directory.exists() and str(checkpoint) in PRESETS:
        return _configured(preset(str(checkpoint)), None, output / "start")
    if not directory.is_dir():
        problem = "is not a directory" if directory.exists() else "does not exist"
        raise HerdError(f"{directory} {problem}: give a checkpoint directory, a config.json, or one of calf, "
                        f"{', '.join(PRESETS)}")
    return Start(directory, fresh)


def _configured(config: HerdConfig, beside: Path | None, directory: Path) -> Start:
    """A directory with a configuration and a tokenizer, and no weights."""
    own = beside and any((beside / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    source = beside if own else CALF
    if source is None or not source.is_dir():
        raise HerdError("there is no tokenizer: give a directory with config.json and tokenizer.json (--checkpoint)")
    config = config if own else with_vocabulary(config, read_config(CALF))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name in PROCESSOR_FILES:
            if (source / name).is_file():
                with atomic_file(directory / name) as path:
                    shutil.copyfile(source / name, path)
        with atomic_file(directory / "config.json") as path:
            path.write_text(json.dumps(to_hf(config), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise HerdError(f"{directory} cannot be written ({error.strerror}): choose another output") from error
    logger.info("tokenizer of %s", "the calf" if source == CALF else source)
    return Start(directory, fresh=True)


def with_vocabulary(config: HerdConfig, other: HerdConfig) -> HerdConfig:
    """A configuration that reads and writes the tokens of another."""
    names = ("vocab_size", "bos_token_id", "eos_token_ids", "pad_token_id")
    text = replace(config.text, **{name: getattr(other.text, name) for name in names})
    return replace(config, text=text, image_token_id=other.image_token_id,
                   begin_image_token_id=other.begin_image_token_id, end_image_token_id=other.end_image_token_id)


def open_model(directory: Path) -> Llama4:
    """A model with a checkpoint's weights, in float32; see ``checkpoint_directory`` for names.

    Raises:
        HerdError: it cannot be read, or there is no memory for it.
    """
    with open_checkpoint(directory) as checkpoint:
        logger.info("reading the weights of %s, %s", checkpoint.directory, _described(checkpoint.config))
        return Llama4.from_checkpoint(checkpoint)


def new_model(directory: Path, seed: int) -> Llama4:
    """A model with random weights (``model/llama4/initialization.py``), by the ``config.json`` of a directory.

    Raises:
        HerdError: there is none, or there is no memory for the model.
    """
    config = read_config(directory)
    logger.info("random weights by %s, %s", directory / "config.json", _described(config))
    torch.manual_seed(seed)
    return initialize(Llama4(config))


def _described(config: HerdConfig) -> str:
    """The size of a model.

    Raises:
        HerdError: its weights in float32 are more than the memory of this machine.
    """
    count = model_size(config).total
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if 4 * count > memory:
        raise HerdError(f"the model has {count / 1e9:.1f} billion parameters, in float32 {size(4 * count)}, and this "
                        f"machine {size(memory)} of memory: take a smaller model")
    return f"{count / 1e6:.2f} million parameters"
