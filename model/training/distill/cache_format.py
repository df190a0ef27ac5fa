"""How a teacher's targets lie on disk.

A cache is a directory with ``index.json``, which lists complete shards with their hashes, and safetensors shards:

================ ============ ==============================================================================
tensor           type, shape  content
================ ============ ==============================================================================
``key``          u8 [W, 32]   SHA-256 of each document's token ids
``labels_key``   u8 [W, 32]   of its labels: only labelled tokens are kept
``tiles_key``    u8 [W, 32]   of its pictures' tiles, zeros without
``first``        i64 [W + 1]  first row of each document, and the end
``ids``          i32 [M, K]   kept ids
``logprobs``     bf16 [M, K]  log p at the cache's temperature, exact where p is large: bf16 is relative
``logsumexp``    f32 [M]      with the log-probabilities it gives the logits back
``tail``         f32 [M]      mass of all other ids
``label_logprob``  f32 [M]    log p(y) at temperature 1, for weightings
``entropy``      f32 [M]      at temperature 1, for weightings
================ ============ ==============================================================================

W documents, M labelled tokens, K ids, the best of the teacher. K = 64 takes 400 bytes a token, so this is for
fine-tuning and small students; a pretraining of 10^12 tokens keeps its teacher online.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ....errors import HerdError
from ....reading import read_json
from ...checkpoint.tensors.header import read_header
from ...checkpoint.tensors.lazy import FileTensor
from .sparsify import TopK

INDEX = "index.json"
FORMAT = 2
KEYS = ("key", "labels_key", "tiles_key")


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """What a cache holds, the same for all of its shards.

    Attributes:
        tokenizer: hash of the teacher's (``identity.tokenizer_hash``).
        vocabulary: V.
        k: ids per token.
        temperature: of the distillation.
    """

    tokenizer: str
    vocabulary: int
    k: int = 64
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.k > self.vocabulary:
            raise HerdError(f"{self.k} best ids cannot be kept of a vocabulary of {self.vocabulary}: keep fewer")

    @property
    def sparsifier(self) -> TopK:
        """Makes such targets of logits."""
        return TopK(k=self.k, temperature=self.temperature)

    @property
    def bytes_per_token(self) -> int:
        """Of a labelled token, without keys: ids, log-probabilities, four numbers."""
        return self.k * (4 + 2) + 4 * 4


@dataclass(frozen=True)
class ShardEntry:
    """A complete shard in the index."""

    file: str
    sha256: str
    bytes: int
    documents: int
    tokens: int


@dataclass(frozen=True)
class Place:
    """Where a document's rows lie, and how it was labelled."""

    shard: int
    begin: int
    end: int
    labels_key: bytes


def read_index(directory: Path) -> tuple[CacheSpec, list[ShardEntry]]:
    """What ``index.json`` says.

    Raises:
        HerdError: no cache, one of another format, or an index that is not what is written here.
    """
    if not (directory / INDEX).is_file():
        raise HerdError(f"{directory} has no {INDEX}: it is not a cache of teacher targets")
    raw = read_json(directory / INDEX)
    if raw.get("format") != FORMAT:
        raise HerdError(f"{directory} is a cache of format {raw.get('format')}, this version reads {FORMAT}: make it "
                        "again")
    try:
        return CacheSpec(**raw["spec"]), [ShardEntry(**entry) for entry in raw["shards"]]
    except (TypeError, KeyError) as error:
        raise HerdError(f"{directory / INDEX} is damaged ({error}): make the cache again") from error


def index_content(spec: CacheSpec, shards: list[ShardEntry]) -> dict[str, Any]:
    """What ``read_index`` reads."""
    return {"format": FORMAT, "spec": asdict(spec), "shards": [asdict(entry) for entry in shards]}


def open_shard(directory: Path, entry: ShardEntry) -> dict[str, FileTensor]:
    """A shard's tensors, not read yet.

    Raises:
        HerdError: it is missing, has another size, or its header is damaged.
    """
    path = directory / entry.file
    if path.parent != directory:
        raise HerdError(f"{directory / INDEX} names {entry.file}, which leaves the cache: make the cache again")
    if not path.is_file():
        raise HerdError(f"{path} is missing: restore it, or make the cache again")
    if path.stat().st_size != entry.bytes:
        raise HerdError(f"{path} has {path.stat().st_size} bytes, {entry.bytes} were written: restore it, or make the "
                        "cache again")
    return read_header(path)


def places_of(tensors: dict[str, FileTensor], shard: int) -> dict[bytes, Place]:
    """Where a shard's documents lie, by ``Document.identity``."""
    keys, labels, tiles = (_rows(tensors[name].read()) for name in KEYS)
    first = tensors["first"].read().tolist()
    return {key + tiles[at]: Place(shard, first[at], first[at + 1], labels[at]) for at, key in enumerate(keys)}


def stored_name(field: str) -> str:
    """Name of a field's tensor: without the shape."""
    return field.rpartition("_")[0]


def _rows(keys_W32: Tensor) -> list[bytes]:
    return [bytes(row) for row in keys_W32.numpy()]
