"""Hugging Face layout: safetensors in one file or in shards with an index, full precision or FP8 with scales.

Three variations are normal and all become canonical tensors: names with or without the multimodal model's prefixes;
experts fused ([E, D, 2F], contraction first) or one ``nn.Linear`` each ([F, D], as quantised checkpoints store them);
weights in FP8 with a scale beside them (compressed-tensors and its kin).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from ...errors import HerdError
from ...reading import read_json
from ..config import HerdConfig
from .base import Checkpoint, check_tensors, shortened
from .names import canonical_name, is_buffer, stored_name
from .quantized import split_scales, with_scales
from .tensors.header import read_header
from .tensors.lazy import LazyTensor
from .tensors.views import Concat, Stack, Transposed

__all__ = ["INDEX", "SINGLE", "canonical_name", "fuse_experts", "open_huggingface", "shards_of",
           "stored_name"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_EXPERT = re.compile(r"(layers\.[0-9]{1,9}\.feed_forward\.experts)\.(0|[1-9][0-9]{0,8})\.(gate|up|down)_proj\.weight")


def open_huggingface(directory: Path, config: HerdConfig) -> Checkpoint:
    """Open a checkpoint directory with safetensors.

    Args:
        directory: with ``model.safetensors``, or with shards and ``model.safetensors.index.json``.
        config: of its ``config.json``.

    Raises:
        HerdError: a file is missing or damaged, or the tensors do not fit the configuration.
    """
    shards = shards_of(directory)
    stored: dict[str, LazyTensor] = {}
    for path, listed in shards.items():
        for name, tensor in _shard_tensors(path, listed).items():
            if canonical_name(name) in stored:
                raise HerdError(f"{directory} has {shortened(canonical_name(name))} twice, once more as "
                                f"{shortened(name)} in {path.name}: remove the shards of another model")
            stored[canonical_name(name)] = tensor
    if config.text.tie_word_embeddings:
        stored.pop("lm_head.weight", None)
    weights, scales, input_scales, cache_scales = split_scales(stored)
    tensors = fuse_experts(with_scales(directory, weights, scales))
    check_tensors(directory, config, tensors)
    return Checkpoint(directory, config, tensors, list(shards), input_scales, cache_scales)


def shards_of(directory: Path) -> dict[Path, set[str] | None]:
    """Weight files with the stored names that the index lists for each; None without an index.

    Raises:
        HerdError: no weights, an index that is none, or a file that is missing or lies outside.
    """
    index, single = directory / INDEX, directory / SINGLE
    if not index.is_file():
        if single.is_file():
            return {single: None}
        raise HerdError(f"{directory} has neither {SINGLE} nor {INDEX}: weights are read from safetensors files")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise HerdError(f"{index} is not a safetensors index: it has no weight_map of file names; download it again")
    listed: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        listed.setdefault(file, set()).add(name)
    for file in listed:
        if Path(file).name != file:
            raise HerdError(f"{index} names {shortened(file)!r}, which is outside of the checkpoint: refused")
        if not os.path.isfile(directory / file):  # noqa: PTH113 - Path.is_file raises for a name that is too long
            raise HerdError(f"{directory / shortened(file)} is missing, {INDEX} names it: download the shard")
    return {directory / file: names for file, names in listed.items()}


def _shard_tensors(path: Path, listed: set[str] | None) -> dict[str, LazyTensor]:
    """A shard's weights by stored name, after comparing them with what the index says of the shard."""
    found: dict[str, LazyTensor] = {n: tensor for n, tensor in read_header(path).items() if not is_buffer(n)}
    if listed is None:
        return found
    absent = sorted(name for name in listed - found.keys() if not is_buffer(name))
    if absent:
        raise HerdError(f"{path} does not hold {shortened(absent[0])}, which {INDEX} lists there: "
                        "download both again")
    unlisted = sorted(found.keys() - listed)
    if unlisted:
        raise HerdError(f"{path} holds {shortened(unlisted[0])}, which {INDEX} does not list there: "
                        "download both again")
    return found


def fuse_experts(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Present experts that are stored one by one as the fused canonical tensors; one expert's read stays its own.

    Args:
        tensors: by canonical name, experts as ``experts.{e}.{gate,up,down}_proj.weight`` of shape [out, in].

    Returns:
        The other tensors, and ``experts.gate_up_proj`` [E, D, 2F] and ``experts.down_proj`` [E, F, D].

    Raises:
        HerdError: a layer has an expert without one of its three matrices, or one that is no matrix.
    """
    fused = {name: tensor for name, tensor in tensors.items() if not _EXPERT.fullmatch(name)}
    layers: dict[str, dict[tuple[int, str], LazyTensor]] = {}
    for name, tensor in tensors.items():
        if match := _EXPERT.fullmatch(name):
            if len(tensor.shape) != 2:
                raise HerdError(f"{name} has {len(tensor.shape)} axes, a matrix is needed: the export is broken")
            layers.setdefault(match[1], {})[int(match[2]), match[3]] = Transposed(tensor)
    for prefix, parts in layers.items():
        experts = range(1 + max(expert for expert, _ in parts))  # an index that is made up ends at the first gap
        absent = next(((e, kind) for e in experts for kind in ("gate", "up", "down") if (e, kind) not in parts), None)
        if absent is not None:
            expert, kind = absent
            raise HerdError(f"{prefix}.{expert} has no {kind}_proj: a shard is missing or the export is broken")
        for (expert, kind), part in parts.items():
            if part.shape != parts[0, kind].shape:
                raise HerdError(f"{prefix}.{expert}.{kind}_proj has shape {list(part.shape[::-1])}, that of expert 0 "
                                f"has {list(parts[0, kind].shape[::-1])}: the export is broken")
        fused[f"{prefix}.gate_up_proj"] = Stack([Concat((parts[e, "gate"], parts[e, "up"]), axis=1) for e in experts])
        fused[f"{prefix}.down_proj"] = Stack([parts[e, "down"] for e in experts])
    return fused
