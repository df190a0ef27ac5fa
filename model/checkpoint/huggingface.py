"""Hugging Face layout: safetensors in one file or in shards with an index, full precision or FP8 with scales.

Three variations are normal and all become canonical tensors: names with or without the multimodal model's prefixes;
experts fused ([E, D, 2F], contraction first) or one ``nn.Linear`` each ([F, D], as quantised checkpoints store them);
weights in FP8 with a scale beside them (compressed-tensors and its kin).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ...errors import HerdError
from ..config import HerdConfig
from .base import Checkpoint, check_tensors
from .lazy import Concat, FileTensor, LazyTensor, Stack, transposed
from .quantized import split_scales, with_scales

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.")
_IGNORED = ("rotary_emb.inv_freq", "rotary_embedding.freqs_ci", "_extra_state")
_EXPERT = re.compile(r"(layers\.\d+\.feed_forward\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}


def open_huggingface(directory: Path, config: HerdConfig) -> Checkpoint:
    """Open a checkpoint directory with safetensors.

    Raises:
        HerdError: a file is missing or damaged, or the tensors do not fit the configuration.
    """
    files = weight_files(directory)
    stored: dict[str, LazyTensor] = {}
    for path in files:
        stored |= read_header(path)
    if config.text.tie_word_embeddings:
        stored.pop("lm_head.weight", None)
    weights, scales, input_scales = split_scales(stored)
    tensors = fuse_experts(with_scales(directory, weights, scales))
    check_tensors(directory, config, tensors)
    return Checkpoint(directory, config, tensors, files, input_scales)


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a directory, in the index's order.

    Raises:
        HerdError: there are none, or the index is damaged or names a file that is not there.
    """
    index, single = directory / INDEX, directory / SINGLE
    if not index.is_file():
        if single.is_file():
            return [single]
        raise HerdError(f"{directory} has neither {SINGLE} nor {INDEX}: weights are read from safetensors files")
    try:
        names = list(dict.fromkeys(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HerdError(f"{index} is not a safetensors index ({error}): download it again") from error
    for name in names:
        if Path(name).name != name:
            raise HerdError(f"{index} names {name!r}, which is outside of the checkpoint: refused")
        if not (directory / name).is_file():
            raise HerdError(f"{directory / name} is missing, {INDEX} names it: download the shard")
    return [directory / name for name in names]


def read_header(path: Path) -> dict[str, LazyTensor]:
    """Canonical names of a file's tensors; reads the header only.

    Raises:
        HerdError: not a safetensors file, cut off, or of an unknown type.
    """
    try:
        # The library checks the header, the offsets in it and the length of the file; numpy keeps it from mapping
        # the file privately, which needs as much free memory as the file is long.
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise HerdError(f"{path} is damaged or cut off ({error}): download it again") from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    try:
        return {
            canonical_name(name): FileTensor(
                path, 8 + length + entry["data_offsets"][0], tuple(entry["shape"]), _DTYPES[entry["dtype"]]
            )
            for name, entry in header.items() if name != "__metadata__" and not name.endswith(_IGNORED)
        }
    except KeyError as error:
        raise HerdError(f"{path} holds a tensor of type {error.args[0]}, which is not supported") from error


def canonical_name(stored: str) -> str:
    """Name without the multimodal model's prefixes."""
    prefix = next((prefix for prefix in _PREFIXES if stored.startswith(prefix)), "")
    return stored.removeprefix(prefix)


def stored_name(canonical: str, config: HerdConfig) -> str:
    """The name under which transformers stores a canonical tensor of this model."""
    if canonical.startswith(("vision_model.", "multi_modal_projector.")):
        return canonical
    inner = canonical if canonical.startswith("lm_head.") else f"model.{canonical}"
    return f"language_model.{inner}" if config.vision else inner


def fuse_experts(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Present experts that are stored one by one as the fused canonical tensors.

    Raises:
        HerdError: a layer has an expert without one of its three matrices.
    """
    fused = {name: tensor for name, tensor in tensors.items() if not _EXPERT.fullmatch(name)}
    layers: dict[str, dict[tuple[int, str], LazyTensor]] = {}
    for name, tensor in tensors.items():
        if match := _EXPERT.fullmatch(name):
            layers.setdefault(match[1], {})[int(match[2]), match[3]] = transposed(tensor)
    for prefix, parts in layers.items():
        experts = 1 + max(expert for expert, _ in parts)
        for expert in range(experts):
            for kind in ("gate", "up", "down"):
                if (expert, kind) not in parts:
                    raise HerdError(f"{prefix}.{expert} has no {kind}_proj: a shard is missing or the export is broken")
        gate_up = [Concat((parts[e, "gate"], parts[e, "up"]), axis=1) for e in range(experts)]
        fused[f"{prefix}.gate_up_proj"] = Stack(gate_up)
        fused[f"{prefix}.down_proj"] = Stack([parts[e, "down"] for e in range(experts)])
    return fused
