"""The files of a model that was split over tensor-parallel ranks, one file for each, and how their parts join.

The rules are those of llama-models' ``checkpoint.py``: column-parallel weights join along their rows, row-parallel
ones along their columns, and what is in neither list is equal on all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ....errors import HerdError
from ..tensors.lazy import LazyTensor, MappedTensor
from ..tensors.views import Concat


class TensorParallelFiles:
    """The tensors of all files under their stored names; remembers which names were asked for.

    Args:
        directory: of the checkpoint, for messages.
        tensors: the content of each file, in the ranks' order.
    """

    def __init__(self, directory: Path, tensors: Sequence[dict[str, Tensor]]) -> None:
        self.directory = directory
        self._tensors = tensors
        self._used: set[str] = set()

    def has(self, name: str) -> bool:
        """Whether the first file has a tensor of this name."""
        return name in self._tensors[0]

    def parts(self, *names: str) -> list[LazyTensor]:
        """The parts of a tensor, one of each file, under the first of several names that exists.

        Raises:
            HerdError: no file has one of the names, not all have it, or their shapes differ.
        """
        name = next((name for name in names if self.has(name)), None)
        if name is None:
            raise HerdError(f"{self.directory} has no tensor {names[0]}: a file is missing or params.json is another's")
        if any(name not in file for file in self._tensors):
            raise HerdError(f"{self.directory}: {name} is not in every consolidated.*.pth: they do not belong together")
        shapes = [list(file[name].shape) for file in self._tensors]
        if any(shape != shapes[0] for shape in shapes):
            raise HerdError(f"{self.directory}: {name} has the shapes {shapes} in its consolidated.*.pth: they do not "
                            "belong together")
        self._used.add(name)
        return [MappedTensor(file[name]) for file in self._tensors]

    def rows(self, *names: str) -> LazyTensor:
        """A column-parallel weight or its bias, or a vocabulary-parallel embedding: ranks hold ranges of rows."""
        return join(self.parts(*names), 0)

    def columns(self, *names: str) -> LazyTensor:
        """A row-parallel weight: ranks hold ranges of columns."""
        return join(self.parts(*names), 1)

    def equal(self, *names: str) -> LazyTensor:
        """A tensor that is the same on all ranks."""
        return self.parts(*names)[0]

    def skip(self, name: str) -> None:
        """Accept a tensor that is not needed."""
        self._used.add(name)

    def unknown(self) -> list[str]:
        """Names that the files hold and that were not asked for."""
        return sorted({name for file in self._tensors for name in file} - self._used)


def join(parts: list[LazyTensor], axis: int) -> LazyTensor:
    """Parts of one tensor along an axis; a single part is the tensor."""
    return parts[0] if len(parts) == 1 else Concat(parts, axis)
