"""What a checkpoint, a bundle, a TensorRT plan or a pipeline holds, found out without printing anything.

``describe`` opens whatever a path is; each description knows its JSON. What needs torch or ONNX is imported where it is
needed, so that a bundle is described in the base install.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import HerdError
from ..model.config import HerdConfig
from ..model.config.parameter_counts import ModelSize, model_size
from ..model.config.presets import is_preset, preset
from ..model.processing.generation_defaults import GenerationDefaults
from ..model.quantization.formats import CACHE_BYTES
from ..runtimes.bundle.manifest import MANIFEST, PROCESSOR, Bundle, Manifest
from .cache_type import cache_row_bytes, cache_type
from .plan_description import PLAN, PlanDescription, describe_plan


@dataclass(frozen=True)
class PresetDescription:
    """A model of which the configuration alone is known.

    Attributes:
        name: as it was given.
        config: the model.
    """

    name: str
    config: HerdConfig

    @property
    def size(self) -> ModelSize:
        """Parameters, and bytes of keys and values."""
        return model_size(self.config)

    def to_json(self) -> dict[str, Any]:
        """Plain dictionary."""
        return {"preset": self.name, "facts": self.size.to_json(), "config": self.config.to_json()}


@dataclass(frozen=True)
class CheckpointDescription:
    """A checkpoint.

    Attributes:
        path: its directory, as it was given.
        fingerprint: SHA-256 of what it holds.
        config: the model.
        files: bytes of each file with weights, by name.
        sampling: how its authors want it sampled, in words.
    """

    path: Path
    fingerprint: str
    config: HerdConfig
    files: dict[str, int]
    sampling: str

    @property
    def size(self) -> ModelSize:
        """Parameters, and bytes of keys and values."""
        return model_size(self.config)

    def to_json(self) -> dict[str, Any]:
        """Plain dictionary."""
        return {"checkpoint": str(self.path), "fingerprint": self.fingerprint, "facts": self.size.to_json(),
                "config": self.config.to_json(), "files": {name: (count, "") for name, count in self.files.items()}}


@dataclass(frozen=True)
class BundleDescription:
    """A bundle whose files were verified.

    Attributes:
        path: its directory, as it was given.
        manifest: what it declares about itself.
        caches: type of keys and values, None where its graph does not say it.
        sampling: how the model's authors want it sampled, in words.
    """

    path: Path
    manifest: Manifest
    caches: str | None
    sampling: str

    @property
    def size(self) -> ModelSize:
        """Parameters, and bytes of keys and values as they are stored; at 16 bit where that is not known."""
        config, in_blocks = self.manifest.config, self.manifest.target == "cpu"
        known = self.caches if self.caches in CACHE_BYTES else None
        row = cache_row_bytes(known, config.text.head_dim, in_blocks=in_blocks) if known else None
        return model_size(config, kv_row_bytes=row)

    @property
    def plan_files(self) -> list[Path]:
        """TensorRT plans that ``describe`` can read."""
        is_readable = self.manifest.target == "tensorrt-rtx"
        return [self.path / f"{role}{PLAN}" for role in self.manifest.plans] if is_readable else []

    def origin(self) -> dict[str, Any]:
        """What it was built from, for what and with what."""
        manifest = self.manifest
        return {"bundle": str(self.path), "format": manifest.format, "target": manifest.target,
                "recipe": manifest.recipe, "graphs": manifest.graphs,
                **({"shards": str(manifest.shards.plan)} if manifest.shards else {}),
                **manifest.source, "toolchain": manifest.toolchain}

    def to_json(self) -> dict[str, Any]:
        """Plain dictionary."""
        plans: dict[str, Any] = {"plans": self.manifest.plans} if self.manifest.plans else {}
        plans |= {"bits": self.manifest.bits} if self.manifest.bits else {}
        files = {name: (entry.bytes, entry.sha256) for name, entry in self.manifest.files.items()}
        return {**self.origin(), **plans, "facts": self.size.to_json(), "config": self.manifest.config.to_json(),
                "files": files}


@dataclass(frozen=True)
class PipelineDescription:
    """The passes of a target and a recipe, in order: name and purpose."""

    target: str
    recipe: str
    passes: list[tuple[str, str]]

    def to_json(self) -> dict[str, Any]:
        """Plain dictionary."""
        return {"target": self.target, "recipe": self.recipe,
                "passes": [{"name": name, "purpose": purpose} for name, purpose in self.passes]}


Description = PresetDescription | CheckpointDescription | BundleDescription | PlanDescription


def describe(path: Path) -> Description:
    """Find out what a checkpoint, a bundle or a TensorRT plan holds, or what a preset is.

    Args:
        path: a directory, a file that ends in ``.plan``, or the name of a preset where nothing is called so.

    Raises:
        HerdError: nothing of these, damaged, or of another version.
    """
    if is_preset(str(path)) and not path.exists():
        return PresetDescription(str(path), preset(str(path)))
    if path.suffix == PLAN and path.is_file():
        return describe_plan(path)
    if (path / MANIFEST).is_file():
        bundle = Bundle.open(path)
        return BundleDescription(path, bundle.manifest, cache_type(bundle), _sampling(path / PROCESSOR))
    return _describe_checkpoint(path)


def describe_pipeline(name: str) -> PipelineDescription:
    """Find out the passes that made a bundle, or that a target runs.

    Args:
        name: a bundle's path, ``TARGET`` or ``TARGET:RECIPE``.

    Raises:
        HerdError: no such bundle, or a recipe that the target does not know.
    """
    from .targets.describe import described_passes
    from .targets.registry import TARGETS, target_of

    target_name, _, recipe = name.partition(":")
    if target_name not in TARGETS or Path(name).exists():
        manifest = Bundle.open(Path(name), verify=False).manifest
        target_name, recipe = manifest.target, manifest.recipe
    target, precision = target_of(target_name, recipe or TARGETS[target_name].recipes[0])
    return PipelineDescription(target_name, precision.name, described_passes(target, precision))


def _describe_checkpoint(path: Path) -> CheckpointDescription:
    from ..model.checkpoint import open_checkpoint

    with open_checkpoint(path) as checkpoint:
        files = {file.name: file.stat().st_size for file in checkpoint.weight_files}
        sampling = _sampling(checkpoint.directory)
        return CheckpointDescription(path, checkpoint.fingerprint(), checkpoint.config, files, sampling)


def _sampling(directory: Path) -> str:
    """What ``generation_config.json`` recommends, in words; the end of a text is no part of it."""
    try:
        found = asdict(GenerationDefaults.from_directory(directory))
    except HerdError as error:  # inspecting is how one finds out
        return f"unknown: {error}"
    given = {name: value for name, value in found.items() if name != "eos_ids" and value is not None}
    words = ", ".join(f"{name.replace('_', '-')} {value:g}" for name, value in given.items())
    return words if found["temperature"] else ", ".join(filter(None, ("greedy", words)))
