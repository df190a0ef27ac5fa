"""Targets of a teacher that were kept on disk, so that it runs once and not once per student or epoch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....errors import HerdError
from ....files import sha256_of
from .cache_format import INDEX, Place, open_shard, places_of, read_index, stored_name
from .documents import Document
from .identity import require_tokenizer
from .targets import TopKTargets


class TargetCache:
    """A cache, for reading.

    Args:
        directory: written by ``CacheWriter``.
        tokenizer: hash of the student's tokenizer.

    Raises:
        HerdError: not a cache, made with another tokenizer, or damaged.
    """

    def __init__(self, directory: Path, *, tokenizer: str) -> None:
        self.directory = directory
        self.spec, self._entries = read_index(directory)
        require_tokenizer(self.spec.tokenizer, tokenizer, f"the teacher of {directory}")
        self._shards = [open_shard(directory, entry) for entry in self._entries]
        self._places: dict[bytes, Place] = {}
        for number, tensors in enumerate(self._shards):
            self._places |= places_of(tensors, number)
        self._verified: set[int] = set()

    def __len__(self) -> int:
        """Documents."""
        return len(self._places)

    @property
    def tokens(self) -> int:
        """Labelled tokens."""
        return sum(entry.tokens for entry in self._entries)

    @property
    def bytes_per_token(self) -> float:
        """On disk, with keys and headers."""
        return sum(entry.bytes for entry in self._entries) / max(1, self.tokens)

    def read(self, document: Document) -> TopKTargets:
        """Targets of a document's labelled tokens, in order.

        Raises:
            HerdError: it is not here, was labelled otherwise, has other pictures, or lies in a damaged shard.
        """
        place = self._places.get(document.identity)
        what = f"a document of {len(document.ids_L)} tokens ({document.key.hex()[:12]})"
        if place is None and any(known.startswith(document.key) for known in self._places):
            raise HerdError(f"{what} had other pictures when {self.directory} was made: make the cache again")
        if place is None:
            raise HerdError(f"{what} is not among the {len(self)} of {self.directory}: it is new or was cut elsewhere; "
                            "make the cache with the same data and length")
        if place.labels_key != document.labels_key:
            raise HerdError(f"{what} had another loss mask when {self.directory} was made: make the cache again")
        self._verify(place.shard)
        tensors = self._shards[place.shard]
        return self._targets(lambda name: tensors[name].read(slice(place.begin, place.end)))

    def nothing(self) -> TopKTargets:
        """Targets of no token."""
        k = self.spec.k
        empty = {"ids": torch.zeros(0, k, dtype=torch.int32), "logprobs": torch.zeros(0, k, dtype=torch.bfloat16)}
        return self._targets(lambda name: empty.get(name, torch.zeros(0)))

    def _targets(self, read: Callable[[str], Tensor]) -> TopKTargets:
        names = [field.name for field in fields(TopKTargets) if field.name not in ("size", "temperature")]
        found: dict[str, Any] = {name: read(stored_name(name)) for name in names}
        return TopKTargets(**found, size=self.spec.vocabulary, temperature=self.spec.temperature)

    def _verify(self, shard: int) -> None:
        """Compare a shard with its hash, once, when it is first needed."""
        if shard in self._verified:
            return
        entry = self._entries[shard]
        if sha256_of(self.directory / entry.file) != entry.sha256:
            raise HerdError(f"{self.directory / entry.file} is damaged, its SHA-256 is not the one in {INDEX}: restore "
                            "it, or make the cache again")
        self._verified.add(shard)
