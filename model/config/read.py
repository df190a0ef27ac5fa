"""The configuration of a checkpoint directory, whoever published it. Torch-free."""

from __future__ import annotations

from pathlib import Path

from ...errors import HerdError
from ...reading import read_json
from .config import HerdConfig
from .huggingface import from_hf
from .meta import from_meta
from .presets import is_preset

CALF = Path(__file__).parents[2] / "examples" / "calf" / "checkpoint"
"""A small model that the repository carries, and the wheel does not."""


def located(directory: str | Path) -> Path:
    """A checkpoint's directory; ``calf``, where nothing is called so, is the model that the repository carries."""
    path = Path(directory)
    return CALF if path == Path("calf") and CALF.exists() and not path.exists() else path


def read_config(directory: Path) -> HerdConfig:
    """Read ``config.json`` (Hugging Face) or ``params.json`` (Meta) of a checkpoint directory, or of ``calf``.

    Raises:
        HerdError: no such directory or file, not JSON, or not a Llama 4 configuration.
    """
    directory = located(directory)
    if directory.suffix.lower() == ".gguf" and directory.is_file():
        raise HerdError(f"{directory} is a GGUF file: make a checkpoint of it by "
                        f"`herdgraph upcycle {directory} -o CHECKPOINT`")
    if is_preset(str(directory)) and not directory.exists():
        raise HerdError(f"{directory} is a configuration without weights: give a checkpoint directory")
    if not directory.is_dir():
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
