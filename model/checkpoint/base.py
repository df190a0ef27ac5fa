"""An opened checkpoint, whatever its layout: tensors under canonical names, read lazily."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from torch import Tensor

from ...errors import HerdError
from ..config import HerdConfig
from ..names import expected_tensors
from .lazy import Index, LazyTensor

CARRIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "generation_config.json",
    "preprocessor_config.json", "processor_config.json", "chat_template.jinja", "chat_template.json",
)
"""Files that travel with the weights unchanged."""

_SAMPLE = 1 << 16


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint directory. Nothing but headers has been read.

    Attributes:
        directory: where it lies.
        config: the model.
        tensors: shape, type and reader of every tensor, by canonical name (``model.names``).
        weight_files: files that hold the weights.
        input_scales: scales of quantised inputs that the checkpoint carries, by canonical name of the weight.
    """

    directory: Path
    config: HerdConfig
    tensors: Mapping[str, LazyTensor]
    weight_files: Sequence[Path]
    input_scales: Mapping[str, LazyTensor] = field(default_factory=dict)

    def read(self, name: str, index: Index = None) -> Tensor:
        """One tensor, or entries of its first axis: only their bytes are read.

        Args:
            name: canonical name.
            index: one entry, a range, or None for all.

        Returns:
            A tensor of its own memory, in the stored type; quantised weights are dequantised to float32.
        """
        return self.tensors[name].read(index)

    def carried_files(self) -> list[Path]:
        """Tokenizer, template, generation and processor files that are there."""
        return [self.directory / name for name in CARRIED if (self.directory / name).is_file()]

    def fingerprint(self) -> str:
        """A hash that tells checkpoints apart without reading hundreds of gigabytes.

        SHA-256 over the configuration and, for every weight file, its name, size, and first, middle and last 64 KiB.
        """
        digest = hashlib.sha256(repr(self.config).encode())
        for path in sorted(self.weight_files):
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with path.open("rb") as file:
                for offset in (0, size // 2, max(0, size - _SAMPLE)):
                    file.seek(offset)
                    digest.update(file.read(_SAMPLE))
        return digest.hexdigest()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is held open between reads."""


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
            raise HerdError(f"{directory}: {name} has shape {list(found[name].shape)}, its config gives {list(shape)}")


def _some(names: Sequence[str]) -> str:
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return f"{names[0]}{more}"
