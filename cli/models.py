"""A model by name: a checkpoint's directory, a preset, or a released model as the hub calls it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import HerdError

if TYPE_CHECKING:
    from ..model.config import HerdConfig


def config_of(model: str) -> HerdConfig:
    """The configuration of what is meant by a name; no weights are read.

    Raises:
        HerdError: neither a preset nor a checkpoint.
    """
    from ..model.config import read_config
    from ..model.config.presets import PRESETS, is_preset, preset

    path = Path(model)
    if is_preset(model) and not path.exists():
        return preset(model)
    if path.name == model and not path.exists() and model != "calf":
        raise HerdError(f"{model} is neither a directory nor a preset: give a checkpoint or one of "
                        f"{', '.join(PRESETS)}")
    return read_config(path)
