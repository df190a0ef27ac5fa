"""The bundle: a directory that says what it is, for which model and target, and proves that it is whole.

``manifest.json`` names every file with its size and SHA-256, the configuration, target and recipe, the graphs and
where they came from. A bundle is checked before anything in it is mapped or parsed; no file of it is a pickle, and no
name in it may leave the directory.

==============  =====================================================================================
file            content
==============  =====================================================================================
manifest.json   this module's ``Manifest``
decoder.onnx    decoder graph; its weights in ``decoder.data``
vision.onnx     image graph (multimodal models); its weights in ``vision.data``
*.data.blake3   BLAKE3 of every block of a weight file (``blocks.py``); ``*.data.sha256`` in format 2
processor/      the checkpoint's tokenizer, chat template, generation and processor files, unchanged
rank{r}/        of a sharded bundle, in the place of ``decoder.*``: partitions ``decoder.{k}.onnx`` of one rank
                (``shards.py``), all of whose weights are in ``decoder.data``; or its ``decoder.plan``
==============  =====================================================================================
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from ...errors import HerdError
from ...files import sha256_of
from ...model.config import HerdConfig
from ...reading import read_json
from .blocks import BlockHashes, hashes_file
from .decode import decode, decode_values
from .digests import NEWEST, Algorithm
from .shards import Shards

FORMAT = 3
"""Version 2 names the executor and the provider, and calls the partitions of a rank by their name; version 3 names the
digest of blocks."""
SHA256_FORMAT = 2
"""Read as well: blocks have SHA-256, and nothing says so."""
MANIFEST = "manifest.json"
PROCESSOR = "processor"
WEIGHTS = ".data"


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Size in bytes and SHA-256 of one file."""

    bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a bundle declares about itself.

    Attributes:
        format: version of the bundle format.
        target: name of the lowering, such as ``cpu``.
        executor: what runs the graphs: ``onnxruntime`` or ``tensorrt`` (see ``executors/load.py``).
        provider: what the executor runs them with: an execution provider of ONNX Runtime, such as
            ``CPUExecutionProvider``, or the Python package of TensorRT.
        recipe: precision recipe, such as ``fp32``.
        bits: of the weights of every part of the model, where a size decided them; empty where the recipe did.
        config: the model.
        graphs: role (``decoder``, ``vision``) to file name.
        active_bytes: bytes of weights that one decoded token reads.
        files: every file but the manifest, by its path inside the bundle.
        plans: of TensorRT targets, by role: compute capabilities, TensorRT version, profiles, and what was proved.
        block_digest: what blocks of weights are compared by, beside every weight file (``digests.py``).
        shards: how the decoder is split over ranks, None when it is whole.
        source: fingerprint and directory name of the checkpoint.
        toolchain: package versions that built it.
    """

    format: int = FORMAT
    target: str
    executor: str
    provider: str
    recipe: str
    config: HerdConfig
    graphs: dict[str, str]
    active_bytes: int
    files: dict[str, FileEntry]
    block_digest: Algorithm = NEWEST
    plans: dict[str, dict[str, Any]] = {}
    shards: Shards | None = None
    bits: dict[str, int] = {}
    source: dict[str, str] = {}
    toolchain: dict[str, str] = {}

    def to_json(self) -> dict[str, Any]:
        """Plain dictionary, the content of ``manifest.json``."""
        values: dict[str, Any] = {name: msgspec.to_builtins(getattr(self, name))
                                  for name in self.__struct_fields__ if name != "config"}
        return values | {"config": self.config.to_json()}

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Manifest:
        """Restore what ``to_json`` wrote.

        Raises:
            HerdError: a newer or older format, or a value that is missing, unknown or of the wrong kind.
        """
        found = raw.get("format")
        if type(found) is not int or found not in (SHA256_FORMAT, FORMAT):
            newer = isinstance(found, int) and found > FORMAT
            advice = "update herdgraph" if newer else "build it again with `herdgraph build`"
            raise HerdError(f"the bundle format is {found!r}, this herdgraph reads format {FORMAT}: {advice}")
        config = decode("the manifest", raw, _Config).config
        read: dict[str, Any] = {"config": HerdConfig.from_json(config)}
        if found == SHA256_FORMAT:
            read["block_digest"] = "sha256"
        read |= {name: decode_values(name, raw[name], str) for name in ("graphs", "source", "toolchain") if name in raw}
        if "files" in raw:
            read["files"] = decode_values("files", raw["files"], FileEntry)
        if raw.get("shards") is not None:
            read["shards"] = Shards.from_json(raw["shards"], read["config"].text)
        manifest = decode("the manifest", raw | read, cls)
        for role in ("decoder", "vision") if manifest.config.vision else ("decoder",):
            if role not in manifest.graphs:
                raise HerdError(f"graphs names no {role}: rebuild the bundle")
        return manifest


class _Config(msgspec.Struct):
    """The part of a manifest that the model's own code reads."""

    config: dict[str, Any]


def describe_files(directory: Path) -> dict[str, FileEntry]:
    """Sizes and hashes of all files below a directory, the manifest excepted."""
    found = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name != MANIFEST:
            found[name] = FileEntry(path.stat().st_size, sha256_of(path))
    return found


@dataclass(frozen=True)
class Bundle:
    """A checked bundle directory."""

    directory: Path
    manifest: Manifest

    @classmethod
    def open(cls, directory: str | Path, *, verify: bool = True) -> Bundle:
        """Read and check a bundle.

        Args:
            directory: the bundle.
            verify: compare every file's SHA-256; without it only presence and size are compared.

        Raises:
            HerdError: not a bundle, another format, or a file that is missing, cut, altered or unknown.
        """
        directory = Path(directory)
        if not directory.exists():
            raise HerdError(f"{directory} does not exist: give the directory of a bundle")
        path = directory / MANIFEST
        if not path.is_file():
            checkpoint = any((directory / name).is_file() for name in ("config.json", "params.json"))
            problem = "is a checkpoint" if checkpoint else f"has no {MANIFEST}"
            raise HerdError(f"{directory} {problem}: not a herdgraph bundle; build one with `herdgraph build`")
        raw = read_json(path)
        try:
            manifest = Manifest.from_json(raw)
        except HerdError as error:
            raise HerdError(f"{path}: {error}") from error
        bundle = cls(directory, manifest)
        bundle._check()
        if verify:
            bundle.verify(manifest.files)
        return bundle

    def graph(self, role: str) -> Path:
        """Path of the graph file of a role."""
        return self.directory / self.manifest.graphs[role]

    def files_of(self, rank: int) -> list[str]:
        """Files of a sharded bundle that a rank reads: its own, and for rank 0 those that belong to no rank."""
        ranks = {f"rank{other}" for other in range(self.manifest.shards.plan.world if self.manifest.shards else 0)}
        own = f"rank{rank}"
        return [name for name in self.manifest.files
                if (top := name.partition("/")[0]) == own or (rank == 0 and top not in ranks)]

    @property
    def processor(self) -> Path:
        """Directory of tokenizer, template and image processor files; it may be empty."""
        return self.directory / PROCESSOR

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(entry.bytes for entry in self.manifest.files.values())

    def block_hashes(self, data: Path) -> BlockHashes:
        """The hashes of a weight file's blocks.

        Raises:
            HerdError: there are none, or nobody vouches for them.
        """
        hashes = hashes_file(data, self.manifest.block_digest)
        if hashes.is_file() and hashes.relative_to(self.directory).as_posix() not in self.manifest.files:
            raise HerdError(f"{hashes} is not in the manifest, so nobody vouches for it: rebuild the bundle")
        return BlockHashes(data, self.manifest.block_digest)

    def verify(self, names: Iterable[str]) -> None:
        """Compare the SHA-256 of files with the manifest.

        Raises:
            HerdError: a file was altered.
        """
        with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
            list(pool.map(self._verify, names))

    def _check(self) -> None:
        graphs = (*self.manifest.graphs.values(), *(self.manifest.shards.graphs() if self.manifest.shards else ()))
        for name in (*self.manifest.files, *graphs):
            pure = PurePosixPath(name)
            if pure.is_absolute() or ".." in pure.parts:
                raise HerdError(f"{self.directory / MANIFEST} names {name!r}, which is outside of the bundle: refused")
        for name in graphs:
            if name not in self.manifest.files:
                raise HerdError(f"{self.directory / MANIFEST} has no hash for graph {name!r}: rebuild the bundle")
        self._refuse_links_out((MANIFEST, PROCESSOR, *self.manifest.files))
        for path in self.processor.rglob("*"):
            name = path.relative_to(self.directory).as_posix()
            if not path.is_dir() and name not in self.manifest.files:
                raise HerdError(f"{path} is not in the manifest, so nobody vouches for it: remove it or rebuild the "
                                "bundle")
        for name, entry in self.manifest.files.items():
            path = self.directory / name
            if not path.is_file():
                raise HerdError(f"{path} is missing: copy or rebuild the bundle")
            size = path.stat().st_size
            if size != entry.bytes:
                raise HerdError(f"{path} has {size} bytes, the manifest says {entry.bytes}: copy or rebuild the bundle")

    def _refuse_links_out(self, names: Iterable[str]) -> None:
        """What lies elsewhere may be another's, and is not copied with the bundle."""
        root = os.path.realpath(self.directory)
        for name in names:
            place = os.path.realpath(self.directory / name)
            if os.path.commonpath((root, place)) != root:
                raise HerdError(f"{self.directory / name} leads out of the bundle, to {place}: copy the file into it")

    def _verify(self, name: str) -> None:
        path, entry = self.directory / name, self.manifest.files[name]
        if (found := sha256_of(path)) != entry.sha256:
            raise HerdError(
                f"{path} was altered: SHA-256 is {found[:12]}…, the manifest says {entry.sha256[:12]}…; "
                "copy or rebuild the bundle"
            )


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write ``manifest.json``: the last file of a bundle, since it holds the hashes of the others."""
    text = json.dumps(manifest.to_json(), indent=2) + "\n"
    (directory / MANIFEST).write_text(text, encoding="utf-8")
