"""The configuration of a checkpoint directory, whoever published it. Torch-free."""

from __future__ import annotations

from pathlib import Path

from ...errors import HerdError
from ...reading import read_json
from .config import HerdConfig
from .huggingface import from_hf
from .meta import from_meta


def read_config(directory: Path) -> HerdConfig:
    """Read ``config.json`` (Hugging Face) or ``params.json`` (Meta) of a checkpoint directory.

    Raises:
        HerdError: no such directory or file, not JSON, or not a Llama 4 configuration.
    """
    directory = Path(directory)
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
