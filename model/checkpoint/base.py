"""An opened checkpoint, whatever its layout: tensors under canonical names, read lazily."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from ...errors import HerdError
from ...reading import JSON_BYTES, TEXT_BYTES, open_file
from ..config import HerdConfig
from ..config.names import expected_tensors
from .finite import is_finite, require_finite
from .tensors.files import located
from .tensors.lazy import Index, LazyTensor

PROCESSOR_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "generation_config.json",
    "preprocessor_config.json", "processor_config.json", "chat_template.jinja", "chat_template.json",
)
"""Files that travel with the weights unchanged."""

_BLOCK = 4 << 20
"""Bytes of weights that are checked at once: small enough that the allocator gives the same memory again."""
_SAMPLE = 1 << 16
_SAMPLES = 16
_SHOWN = 200


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it.

    Attributes:
        name: canonical name (``model.config.names``).
        shape: of the whole tensor.
        dtype: of what ``Checkpoint.read`` gives; quantised tensors are given in float32.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint directory. Nothing but headers has been read.

    Attributes:
        directory: where it lies.
        config: the model.
        sources: a reader of every tensor, by canonical name.
        weight_files: files that hold the weights and their scales.
        input_scales: scales of quantised inputs that the checkpoint carries, by the canonical name of the weight that
            the input meets; of experts stored one by one by ``experts.{e}.{gate,up,down}_proj.weight``.
        cache_scales: scales of quantised keys and values that it carries, as ``layers.0.self_attn.k`` and ``.v``.
    """

    directory: Path
    config: HerdConfig
    sources: Mapping[str, LazyTensor]
    weight_files: Sequence[Path]
    input_scales: Mapping[str, LazyTensor] = field(default_factory=dict)
    cache_scales: Mapping[str, LazyTensor] = field(default_factory=dict)

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Shape and type of every tensor, by canonical name."""
        return {name: TensorInfo(name, lazy.shape, lazy.dtype) for name, lazy in self.sources.items()}

    def read(self, name: str, index: Index = None) -> Tensor:
        """One tensor, or entries of its first axis: only their bytes are read.

        Args:
            name: canonical name.
            index: one entry (which drops the axis), a range without a step, or None for all.

        Returns:
            A tensor of its own memory, in the stored type; quantised weights are dequantised to float32.

        Raises:
            HerdError: the checkpoint has no such tensor, it holds a NaN or an infinity, or its file changed since it
                was opened.
        """
        if name not in self.sources:
            raise HerdError(f"{self.directory} has no tensor {name}: names are those of expected_tensors")
        values = self.sources[name].read(index)
        first = (index.start or 0) if isinstance(index, slice) else 0
        if not is_finite(values):
            place = f"{name} [{index}]" if isinstance(index, int) else name
            require_finite(values, located(place, self.sources[name]), first=first)
        return values

    def _checked_bytes(self, name: str, index: Index) -> int:
        return self.read(name, index).nbytes

    def check_weights(self, on_bytes: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Read all weights once, a block at a time: before a long job, which would meet a damaged one late.

        Args:
            on_bytes: called with the bytes that were read so far and those of all weights, as they are given.

        Raises:
            HerdError: names the first tensor that holds a NaN or an infinity, or cannot be read, and its file.
        """
        total = sum(math.prod(info.shape) * info.dtype.itemsize for info in self.tensors.values())
        done = 0
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for name, info in self.tensors.items():
                for count in pool.map(partial(self._checked_bytes, name), _blocks(info)):
                    done += count
                    on_bytes(done, total)

    def processor_files(self) -> list[Path]:
        """Tokenizer, template, generation and processor files that are there, none of them read.

        Raises:
            HerdError: one of their names is no regular file, or it is larger than any of its kind.
        """
        found = [self.directory / name for name in PROCESSOR_FILES if os.path.lexists(self.directory / name)]
        for path in found:
            open_file(path, most=JSON_BYTES if path.suffix == ".json" else TEXT_BYTES).close()
        return found

    def fingerprint(self) -> str:
        """A hash that tells checkpoints apart without reading hundreds of gigabytes.

        SHA-256 over the configuration, the shape and type of every tensor, and for each weight file its name, its
        size and 16 blocks of 64 KiB that are spread evenly from its first byte to its last. A change between the
        blocks of a large file that alters neither is not seen.
        """
        digest = hashlib.sha256(repr(self.config).encode())
        for _, info in sorted(self.tensors.items()):
            digest.update(repr(info).encode())
        for path in sorted(self.weight_files):
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with open_file(path) as file:
                for sample in range(_SAMPLES):
                    file.seek(max(0, size - _SAMPLE) * sample // (_SAMPLES - 1))
                    digest.update(file.read(_SAMPLE))
        return digest.hexdigest()

    def close(self) -> None:
        """End the use. No file is held open between reads; mappings of Meta's files end with this object."""

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _blocks(info: TensorInfo) -> Iterator[Index]:
    """Ranges of a tensor's first axis of at most ``_BLOCK`` bytes, or of one entry, such as an expert."""
    if not info.shape:
        yield None
        return
    entry = math.prod(info.shape[1:]) * info.dtype.itemsize
    step = max(1, _BLOCK // max(1, entry))
    yield from (slice(first, first + step) for first in range(0, info.shape[0], step))


def check_tensors(directory: Path, config: HerdConfig, found: Mapping[str, LazyTensor]) -> None:
    """Compare what a checkpoint holds with what its configuration needs.

    Raises:
        HerdError: a tensor is missing, unknown, or of another shape.
    """
    expected = expected_tensors(config)
    missing = [name for name in expected if name not in found]
    if missing:
        raise HerdError(f"{directory} has no tensor {_some(missing)}: a shard is missing or the config is another's")
    unknown = [name for name in found if name not in expected]
    if unknown:
        raise HerdError(f"{directory} has a tensor {_some(unknown)} that its config does not know: remove it or fix it")
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise HerdError(f"{directory}: {name} has shape {list(found[name].shape)}, its config gives {list(shape)}: "
                            "weights and config are of different models")


def _some(names: Sequence[str]) -> str:
    more = f" (and {len(names) - 3} more)" if len(names) > 3 else ""
    return ", ".join(shortened(name) for name in names[:3]) + more


def shortened(name: str) -> str:
    """A name that somebody else chose, for one line of a message."""
    shown = name if name.isprintable() else ascii(name)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"
