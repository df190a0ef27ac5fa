"""Writing a cache of teacher targets: as batches come, shard by shard, and on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from ....errors import HerdError
from ....files import atomic_file, sha256_of
from ...checkpoint.tensors.write import write_tensors
from ...config import HerdConfig
from ..data.packing import Batch
from .cache_format import (
    INDEX,
    KEYS,
    CacheSpec,
    ShardEntry,
    index_content,
    open_shard,
    places_of,
    read_index,
    stored_name,
)
from .documents import Document, documents
from .targets import DenseTargets, Targets, TopKTargets, join


class CacheWriter:
    """Keeps a teacher's targets. A shard is complete or absent; only complete ones are in the index.

    Use it as a context: leaving writes what is left, also after an interruption. Opening a directory that holds a cache
    of the same kind continues it, and documents that it holds already are not kept again.

    Args:
        directory: to create or continue.
        spec: what to keep.
        config: the teacher's, to tell which tokens stand for tiles.
        shard_bytes: size at which a shard is written.

    Raises:
        HerdError: the directory holds another kind of cache or something else, or cannot be written.
    """

    def __init__(self, directory: Path, spec: CacheSpec, config: HerdConfig, *, shard_bytes: int = 256 << 20) -> None:
        self.directory, self.spec, self._config, self._shard_bytes = directory, spec, config, shard_bytes
        self._entries = self._continued()
        self._known: set[bytes] = set()
        for entry in self._entries:
            self._known |= set(places_of(open_shard(directory, entry), 0))
        self._pending: list[tuple[Document, TopKTargets]] = []

    def missing(self, batch: Batch) -> list[Document]:
        """Documents of a batch that are not kept yet."""
        return [document for document in documents(batch, self._config) if document.identity not in self._known]

    def add(self, batch: Batch, targets: Targets) -> None:
        """Keep the documents of a batch that are missing.

        Args:
            batch: packed rows.
            targets: with all logits, of all B · T tokens.

        Raises:
            HerdError: the logits are of another vocabulary, or the disk is full: complete shards stay.
        """
        if not isinstance(targets, DenseTargets):
            raise HerdError("a cache is made from all logits: give the teacher itself, not another cache")
        targets.require_vocabulary(self.spec.vocabulary)
        for document in self.missing(batch):
            places_M = document.start + document.learned
            logits_MV = targets.logits_NV[places_M.to(targets.logits_NV.device)]
            labels_M = document.labels_L[document.learned.to(document.labels_L.device)]
            kept = self.spec.sparsifier(logits_MV, labels_M.to(logits_MV.device)).map(lambda rows: rows.cpu())
            self._pending.append((document, kept))
            self._known.add(document.identity)
        if sum(len(kept) for _, kept in self._pending) * self.spec.bytes_per_token >= self._shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting as a shard.

        Raises:
            HerdError: it cannot be written; complete shards stay, and a new writer continues after them.
        """
        if not self._pending:
            return
        waiting, self._pending = self._pending, []
        name = f"targets-{len(self._entries):05}.safetensors"
        try:
            with atomic_file(self.directory / name) as path:
                write_tensors(_tensors(waiting), path)
            written = (self.directory / name).stat().st_size
            entry = ShardEntry(name, sha256_of(self.directory / name), written, len(waiting),
                               sum(len(kept) for _, kept in waiting))
            self._write_index([*self._entries, entry])
        except OSError as error:
            raise HerdError(f"writing {self.directory / name} failed: {error.strerror or error}; {len(self._entries)} "
                            "complete shards are kept: make room and run again, it continues there") from error
        self._entries.append(entry)

    @property
    def bytes_per_token(self) -> float:
        """On disk so far, with keys and headers."""
        return sum(entry.bytes for entry in self._entries) / max(1, sum(entry.tokens for entry in self._entries))

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.flush()

    def _continued(self) -> list[ShardEntry]:
        if not (self.directory / INDEX).is_file():
            self._begin()
            return []
        spec, entries = read_index(self.directory)
        for name, wanted in vars(self.spec).items():
            if getattr(spec, name) != wanted:
                raise HerdError(f"{self.directory} is a cache with {name} {getattr(spec, name)}, {wanted} is wanted: "
                                "choose another directory")
        return entries

    def _begin(self) -> None:
        if self.directory.exists() and (not self.directory.is_dir() or any(self.directory.iterdir())):
            raise HerdError(f"{self.directory} is not empty and has no {INDEX}: choose another directory")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._write_index([])
        except OSError as error:
            raise HerdError(f"cannot write to {self.directory}: {error.strerror}; choose another directory") from error

    def _write_index(self, entries: list[ShardEntry]) -> None:
        text = json.dumps(index_content(self.spec, entries), indent=1) + "\n"
        with atomic_file(self.directory / INDEX) as path:
            path.write_text(text, encoding="utf-8")


def keep_targets(writer: CacheWriter, targets_of: Callable[[Batch], Targets], batches: Iterable[Batch]) -> None:
    """Fill a cache; batches of which nothing is missing do not reach the teacher.

    Raises:
        HerdError: as ``CacheWriter.add``.
    """
    for batch in batches:
        if writer.missing(batch):
            writer.add(batch, targets_of(batch))


def _tensors(waiting: list[tuple[Document, TopKTargets]]) -> dict[str, Tensor]:
    joined = join([kept for _, kept in waiting])
    found = {stored_name(name): value.bfloat16() if value.ndim == 2 and value.is_floating_point() else value
             for name, value in joined.tensors().items()}
    for name in KEYS:
        found[name] = torch.tensor([list(getattr(document, name)) for document, _ in waiting], dtype=torch.uint8)
    lengths = torch.tensor([0, *(len(kept) for _, kept in waiting)])
    return {name: value.contiguous() for name, value in {**found, "first": lengths.cumsum(0)}.items()}
