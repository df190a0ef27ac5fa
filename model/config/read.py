"""The configuration of a checkpoint directory, whoever published it. Torch-free."""

from __future__ import annotations

from pathlib import Path

from ...errors import HerdError
from ...reading import read_json
from .config import HerdConfig
from .huggingface import from_hf
from .meta import from_meta
from .presets import is_preset

CALF = Path(__file__).resolve().parents[2] / "examples" / "calf" / "checkpoint"
"""A small model that the repository carries, and the wheel does not."""


def checkpoint_directory(name: str | Path) -> Path:
    """The directory that a checkpoint's name means: its own, or for ``calf``, where no directory is called so, that of
    the model which the repository carries.
    """
    directory = Path(name)
    return CALF if directory == Path("calf") and CALF.exists() and not directory.exists() else directory


def read_config(directory: Path) -> HerdConfig:
    """Read ``config.json`` (Hugging Face) or ``params.json`` (Meta) of a checkpoint directory, or of ``calf``.

    Raises:
        HerdError: no such directory or file, not JSON, or not a Llama 4 configuration.
    """
    directory = checkpoint_directory(directory)
    if is_preset(str(directory)) and not directory.exists():
        raise HerdError(f"{directory} is a configuration without weights: give a checkpoint directory")
    if not directory.is_dir():
        if directory.suffix.lower() == ".gguf":
            raise HerdError(f"{directory} is not a directory: make a checkpoint of it with `herdgraph upcycle`")
        problem = "is not a directory" if directory.exists() else "does not exist"
        raise HerdError(f"{directory} {problem}: give a checkpoint directory with config.json or params.json")
    for name, parse in (("config.json", from_hf), ("params.json", from_meta)):
        path = directory / name
        if path.is_file():
            raw = read_json(path)
            try:
                return parse(raw)
            except HerdError as error:
                raise HerdError(f"{path}: {str(error).removeprefix(f'{name} ')}") from error
    if (directory / "manifest.json").is_file():
        raise HerdError(f"{directory} is a bundle: give the checkpoint that it was built from")
    raise HerdError(f"{directory} holds neither config.json nor params.json: is it a Llama 4 checkpoint?")
