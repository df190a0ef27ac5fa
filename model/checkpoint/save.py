"""Writing Hugging Face checkpoints, tensor by tensor, so that transformers and this project read them alike."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from ...errors import HerdError
from ...files import atomic_directory
from ..config import HerdConfig, to_hf
from ..config.names import expected_tensors
from .huggingface import INDEX, SINGLE
from .names import stored_name
from .tensors.write import write_tensors

CONFIG = "config.json"


def save_checkpoint(
    directory: Path,
    config: HerdConfig,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    processor_files: Mapping[str, bytes | Path] | None = None,
    shard_bytes: int = 2 << 30,
    overwrite: bool = False,
    inputs: Iterable[Path] = (),
) -> None:
    """Write a checkpoint directory in Hugging Face layout; it appears when it is complete.

    Args:
        directory: to create.
        config: written as ``config.json``.
        tensors: canonical names and values, each once, in any order; at most one shard of them is held in memory.
        processor_files: tokenizer, template and processor files by name: their bytes, or a file to copy.
        shard_bytes: size above which a new shard begins.
        overwrite: replace an existing checkpoint.
        inputs: files and directories that the tensors are read from; the output must not overlap them.

    Raises:
        HerdError: the directory exists, overlaps an input or cannot be written, or the tensors are not those of
            the configuration.
    """
    with atomic_directory(directory, overwrite=overwrite, mark=CONFIG, inputs=inputs) as temporary:
        writer = _ShardWriter(temporary, config, shard_bytes)
        for name, tensor in tensors:
            writer.add(name, tensor)
        writer.finish()
        (temporary / CONFIG).write_text(json.dumps(to_hf(config), indent=2) + "\n", encoding="utf-8")
        for name, content in (processor_files or {}).items():
            if isinstance(content, Path):
                shutil.copyfile(content, temporary / name)
            else:
                (temporary / name).write_bytes(content)


class _ShardWriter:
    """Collects tensors and writes a shard when enough are there."""

    def __init__(self, directory: Path, config: HerdConfig, shard_bytes: int) -> None:
        self.directory, self.config, self.shard_bytes = directory, config, shard_bytes
        self.missing = expected_tensors(config)
        self.pending: dict[str, Tensor] = {}
        self.pending_bytes = self.total_bytes = 0
        self.shards: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        shape = self.missing.pop(name, None)
        if shape is None:
            raise HerdError(f"{name} is not a tensor of this configuration, or was given twice: give each of "
                            "expected_tensors once")
        if tuple(tensor.shape) != shape:
            raise HerdError(f"{name} has shape {list(tensor.shape)}, the configuration gives {list(shape)}: "
                            "fix one of them")
        if self.pending and self.pending_bytes + tensor.nbytes > self.shard_bytes:
            self._flush()
        self.pending[stored_name(name, self.config)] = self._own(tensor)
        self.pending_bytes += tensor.nbytes

    def finish(self) -> None:
        if self.missing:
            raise HerdError(f"{next(iter(self.missing))} and {len(self.missing) - 1} more tensors were not given: "
                            "give each of expected_tensors once")
        self._flush()
        if len(self.shards) == 1:
            self._path(0).rename(self.directory / SINGLE)
            return
        weight_map: dict[str, str] = {}
        for index, names in enumerate(self.shards):
            final = f"model-{index + 1:05}-of-{len(self.shards):05}.safetensors"
            self._path(index).rename(self.directory / final)
            weight_map |= dict.fromkeys(names, final)
        content = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        (self.directory / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def _flush(self) -> None:
        write_tensors(self.pending, self._path(len(self.shards)), {"format": "pt"})
        self.shards.append(list(self.pending))
        self.total_bytes += self.pending_bytes
        self.pending, self.pending_bytes = {}, 0

    def _path(self, index: int) -> Path:
        return self.directory / f"shard-{index}.safetensors"

    def _own(self, tensor: Tensor) -> Tensor:
        """The tensor dense and in memory of its own.

        A view would keep what it is cut from in memory until its shard is written, and safetensors refuses tensors
        that share memory, such as one given as embedding and as head. Others are not copied: they can be large.
        """
        dense = tensor.detach().cpu().contiguous()
        shared = any(dense.data_ptr() == other.data_ptr() for other in self.pending.values())
        return dense.clone() if shared or dense.untyped_storage().nbytes() > dense.nbytes else dense
