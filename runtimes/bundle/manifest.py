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
processor/      the checkpoint's tokenizer, chat template, generation and processor files, unchanged
rank{r}/        of a sharded bundle, in the place of ``decoder.*``: pieces ``decoder.{k}.onnx`` of one rank
                (``shards.py``), all of whose weights are in ``decoder.data``; or its ``decoder.plan``
==============  =====================================================================================
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ...errors import HerdError
from ...files import read_json, sha256_of
from ...model.config import HerdConfig
from .shards import Shards
from .validate import strict

FORMAT = 1
MANIFEST = "manifest.json"
PROCESSOR = "processor"
WEIGHTS = ".data"


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 of one file."""

    bytes: int
    sha256: str

    @classmethod
    def from_json(cls, name: str, raw: object) -> FileEntry:
        """Restore what a manifest says of a file."""
        entry = strict(f"file {name!r}", raw, {"bytes": int, "sha256": str})
        return cls(entry["bytes"], entry["sha256"])


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a bundle declares about itself.

    Attributes:
        target: name of the lowering, such as ``cpu``; decides which executor runs it.
        recipe: precision recipe, such as ``fp32``.
        config: the model.
        graphs: role (``decoder``, ``vision``) to file name.
        active_bytes: bytes of weights that one decoded token reads.
        plans: of TensorRT targets, by role: compute capabilities, TensorRT version, profiles, and what was proved.
        files: every file but the manifest, by its path inside the bundle.
        shards: how the decoder is split over ranks, None when it is whole.
        source: fingerprint and directory name of the checkpoint.
        toolchain: package versions that built it.
    """

    target: str
    recipe: str
    config: HerdConfig
    graphs: dict[str, str]
    active_bytes: int
    files: dict[str, FileEntry]
    plans: dict[str, Any] = field(default_factory=dict)
    source: dict[str, str] = field(default_factory=dict)
    toolchain: dict[str, str] = field(default_factory=dict)
    shards: Shards | None = None
    format: int = FORMAT

    def to_json(self) -> dict[str, Any]:
        """Plain dictionary, the content of ``manifest.json``."""
        shards = self.shards.to_json() if self.shards else {}
        return {**asdict(self), "config": self.config.to_json(), "shards": shards}

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Manifest:
        """Restore what ``to_json`` wrote.

        Raises:
            HerdError: a newer or older format, or a value that is missing, unknown or of the wrong kind.
        """
        found = raw.get("format")
        if type(found) is not int or found != FORMAT:
            advice = "update herdgraph" if isinstance(found, int) and found > FORMAT else "rebuild it with build.py"
            raise HerdError(f"the bundle format is {found!r}, this herdgraph reads format {FORMAT}: {advice}")
        values = strict("the manifest", {"shards": {}} | raw, _FIELDS)  # older bundles are whole and do not say so
        config = HerdConfig.from_json(values["config"])
        for name in ("graphs", "source", "toolchain"):
            strict(name, values[name], dict.fromkeys(values[name], str))
        for role in ("decoder", "vision") if config.vision else ("decoder",):
            if role not in values["graphs"]:
                raise HerdError(f"graphs names no {role}: rebuild the bundle")
        files = {name: FileEntry.from_json(name, entry) for name, entry in values["files"].items()}
        shards = Shards.from_json(values["shards"], config.text) if values["shards"] else None
        return cls(**{**values, "config": config, "files": files, "shards": shards})


_FIELDS: dict[str, type] = {
    "target": str, "recipe": str, "config": dict, "graphs": dict, "active_bytes": int, "plans": dict, "files": dict,
    "source": dict, "toolchain": dict, "shards": dict, "format": int,
}


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
            raise HerdError(f"{directory} {problem}: not a herdgraph bundle; build one with build.py")
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

    @property
    def weight_files(self) -> list[str]:
        """Names of the files that hold weights: nearly all the bytes."""
        return [name for name in self.manifest.files if name.endswith(WEIGHTS)]

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
