"""Meta's layout: ``params.json`` and ``consolidated.NN.pth``, one file per tensor-parallel rank.

Files are memory-mapped and unpickled with ``weights_only=True``: no code in them runs. How ranks are joined follows
llama-models' ``checkpoint.py``: column-parallel weights along their rows, row-parallel ones along their columns, the
rest is equal on all ranks. Fused names are undone as its load hooks do:

* ``wqkv`` holds the rank's rows of q, then k, then v, and carries the attention norm;
* ``mlp.fc1_weight`` holds the rank's gate rows, then its up rows;
* experts are two-dimensional, expert-major: [E · D, F] in, [E · F, D] out; ranks cut F;
* ``positional_embedding`` (class token first) is resampled to ``positional_embedding_vlm`` (class token last).

RoPE rows need no permutation: both layouts rotate interleaved pairs. FP8 (``fp8_mixed``): routed experts in FP8 with
scales per output in ``fp8_scales_{rank}.pt``, keyed by w1 (gate), w3 (up) and w2 (down).
"""

from __future__ import annotations

import ctypes
import mmap
import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from ...errors import HerdError
from ..config import HerdConfig, TextConfig, VisionConfig
from .base import Checkpoint, check_tensors
from .lazy import Concat, Converted, Index, LazyTensor, MappedTensor, Reshaped, Rows, Scaled, Unflatten, transposed
from .quantized import FLOAT8

_IGNORED = ("_extra_state", "rope.freqs")
_MADV_DONTNEED = 4
_PAGE = 4096


def open_meta(directory: Path, config: HerdConfig) -> Checkpoint:
    """Open a directory with ``consolidated.*.pth``.

    Raises:
        HerdError: a file is missing or damaged, int4 weights, or the tensors do not fit the configuration.
    """
    files = sorted(directory.glob("consolidated.*.pth"))
    if not files:
        raise HerdError(f"{directory} has params.json but no consolidated.*.pth: download the weights")
    if any(directory.glob("int4_scales_*.pt")):
        raise HerdError(f"{directory} holds int4_mixed weights, which are not supported: use bf16 or fp8_mixed")
    ranks = [_load(path) for path in files]
    scales = [_load(path) for path in sorted(directory.glob("fp8_scales_*.pt"))]
    if scales and len(scales) != len(ranks):
        raise HerdError(f"{directory} has {len(ranks)} weight files and {len(scales)} fp8_scales files: one is missing")
    reader = _Reader(directory, config, ranks, scales)
    tensors = reader.tensors()
    check_tensors(directory, config, tensors)
    return Checkpoint(directory, config, tensors, files)


def _load(path: Path) -> dict[str, Tensor]:
    try:
        content = _map(path)
    except pickle.UnpicklingError as error:
        raise HerdError(f"{path} holds more than tensors and was not loaded: get it from a source you trust") from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise HerdError(f"{path} is damaged or cut off: download it again") from error
    if not isinstance(content, dict):
        raise HerdError(f"{path} holds a {type(content).__name__}, a dictionary of tensors is needed")
    return {name: value for name, value in content.items() if isinstance(value, Tensor) and not name.endswith(_IGNORED)}


def _map(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except RuntimeError as error:
        if "unable to mmap" not in str(error):
            raise
    # torch maps privately, and Linux refuses private mappings of more than the machine's memory. A shared one is
    # not limited; nothing here writes to it.
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


@dataclass(frozen=True)
class _Mapped(MappedTensor):
    """A mapped tensor whose pages are given back after each read, so that a large checkpoint does not stay resident."""

    def read(self, index: Index = None) -> Tensor:
        part = self.value if index is None else self.value[index]
        copy = part.clone()
        if part.is_contiguous():
            first = part.data_ptr() // _PAGE * _PAGE
            length = part.data_ptr() + part.nbytes - first
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), _MADV_DONTNEED)
        return copy


class _Reader:
    """Names every canonical tensor in terms of the ranks' tensors, and remembers which of those it used."""

    def __init__(
        self, directory: Path, config: HerdConfig, ranks: list[dict[str, Tensor]], scales: list[dict[str, Tensor]]
    ) -> None:
        self.directory, self.config, self.ranks, self.scales = directory, config, ranks, scales
        self.used: set[str] = set()

    def tensors(self) -> dict[str, LazyTensor]:
        found = {"embed_tokens.weight": self.joined("tok_embeddings.weight", 0)}
        found["norm.weight"] = self.equal("norm.weight")
        if not self.config.text.tie_word_embeddings:
            found["lm_head.weight"] = self.joined("output.weight", 0)
        for layer in range(self.config.text.num_layers):
            parts = self.decoder_layer(self.config.text, layer)
            found |= {f"layers.{layer}.{name}": tensor for name, tensor in parts.items()}
        if self.config.vision:
            found |= self.vision(self.config.vision)
        unknown = sorted(set(self.ranks[0]) - self.used)
        if unknown:
            raise HerdError(f"{self.directory} has a tensor {unknown[0]} that its params.json does not explain")
        return found

    # -- ranks -------------------------------------------------------------------------------------------------------

    def parts(self, *names: str) -> list[LazyTensor]:
        """The ranks' tensors under the first of several names that exists."""
        name = next((name for name in names if name in self.ranks[0]), None)
        if name is None:
            raise HerdError(f"{self.directory} has no tensor {names[0]}: a file is missing or params.json is another's")
        if any(name not in rank for rank in self.ranks):
            raise HerdError(f"{self.directory}: {name} is not in every consolidated.*.pth: they do not belong together")
        self.used.add(name)
        return [_Mapped(rank[name]) for rank in self.ranks]

    def joined(self, *names_and_axis: str | int) -> LazyTensor:
        """The ranks' tensors joined along an axis, the last argument."""
        *names, axis = names_and_axis
        return _join(self.parts(*map(str, names)), int(axis))

    def equal(self, *names: str) -> LazyTensor:
        """A tensor that is the same on all ranks."""
        return self.parts(*names)[0]

    # -- decoder -----------------------------------------------------------------------------------------------------

    def decoder_layer(self, text: TextConfig, layer: int) -> dict[str, LazyTensor]:
        at, ffn = f"layers.{layer}.attention", f"layers.{layer}.feed_forward"
        found = {
            "input_layernorm.weight": self.equal(
                f"{at}.wqkv.layer_norm_weight", f"layers.{layer}.attention_norm.weight"),
            "post_attention_layernorm.weight": self.equal(
                f"{ffn}.mlp.layer_norm_weight", f"{ffn}.norm.weight", f"layers.{layer}.ffn_norm.weight"),
            "self_attn.o_proj.weight": self.joined(f"{at}.wo.weight", 1),
            **self.queries_keys_values(at, text),
        }
        if layer in text.moe_layers:
            return found | self.mixture(ffn, text)
        return found | self.dense(ffn)

    def queries_keys_values(self, at: str, text: TextConfig) -> dict[str, LazyTensor]:
        names = {"self_attn.q_proj.weight": "wq", "self_attn.k_proj.weight": "wk", "self_attn.v_proj.weight": "wv"}
        if f"{at}.wqkv.weight" not in self.ranks[0]:
            return {name: self.joined(f"{at}.{short}.weight", 0) for name, short in names.items()}
        fused = self.parts(f"{at}.wqkv.weight")
        per_head = fused[0].shape[0] * len(fused) // (text.num_heads + 2 * text.num_kv_heads)
        found, first = {}, 0
        for name, heads in zip(names, (text.num_heads, text.num_kv_heads, text.num_kv_heads), strict=True):
            last = first + heads * per_head // len(fused)
            found[name] = _join([Rows(part, first, last) for part in fused], 0)
            first = last
        return found

    def dense(self, ffn: str) -> dict[str, LazyTensor]:
        down = self.joined(f"{ffn}.mlp.fc2_weight", f"{ffn}.w2.weight", 1)
        if f"{ffn}.mlp.fc1_weight" in self.ranks[0]:
            fused = self.parts(f"{ffn}.mlp.fc1_weight")
            half = fused[0].shape[0] // 2
            gate = _join([Rows(part, 0, half) for part in fused], 0)
            up = _join([Rows(part, half, 2 * half) for part in fused], 0)
        else:
            gate, up = (self.joined(f"{ffn}.{name}.weight", 0) for name in ("w1", "w3"))
        return _feed_forward("feed_forward", gate, up, down)

    def mixture(self, ffn: str, text: TextConfig) -> dict[str, LazyTensor]:
        shared = _feed_forward(
            "feed_forward.shared_expert",
            self.joined(f"{ffn}.w_in_shared_FD.weight", f"{ffn}.shared_expert.w1.weight", 0),
            self.joined(f"{ffn}.w_swiglu_FD.weight", f"{ffn}.shared_expert.w3.weight", 0),
            self.joined(f"{ffn}.w_out_shared_DF.weight", f"{ffn}.shared_expert.w2.weight", 1),
        )
        experts = f"{ffn}.experts"
        gates, ups, downs = (self.experts(experts, stored, key, text.num_experts) for stored, key in (
            ("moe_w_in_eD_F", "w1"), ("moe_w_swiglu_eD_F", "w3"), ("moe_w_out_eF_D", "w2")))
        return {
            "feed_forward.router.weight": transposed(self.equal(f"{ffn}.router_DE")),
            "feed_forward.experts.gate_up_proj": Concat([*gates, *ups], axis=2),
            "feed_forward.experts.down_proj": _join(downs, 1),
            **shared,
        }

    def experts(self, prefix: str, stored: str, key: str, count: int) -> list[LazyTensor]:
        """Each rank's experts [E, in, out], dequantised where they are FP8: the scale belongs to the outputs."""
        parts: list[LazyTensor] = [Unflatten(part, count) for part in self.parts(f"{prefix}.{stored}")]
        if parts[0].dtype not in FLOAT8:
            return parts
        if not self.scales or f"{prefix}.{key}" not in self.scales[0]:
            raise HerdError(f"{self.directory}: {prefix}.{stored} is FP8 and has no scale: fp8_scales_*.pt is missing")
        scales = [MappedTensor(rank[f"{prefix}.{key}"]) for rank in self.scales]
        return [
            Scaled(part, Reshaped(scale, (count, 1, part.shape[2]))) for part, scale in zip(parts, scales, strict=True)
        ]

    # -- image tower -------------------------------------------------------------------------------------------------

    def vision(self, vision: VisionConfig) -> dict[str, LazyTensor]:
        at, adapter = "vision_embeddings.vision_encoder", "vision_embeddings.vision_adapter.mlp"
        found = {
            "class_embedding": self.equal(f"{at}.class_embedding"),
            "positional_embedding_vlm": self.positions(at, vision.patches_per_side),
            "patch_embedding.linear.weight": self.joined(f"{at}.conv1._linear.weight", 0),
            "vision_adapter.mlp.fc1.weight": self.joined(f"{adapter}.c_fc.weight", 0),
            "vision_adapter.mlp.fc2.weight": self.joined(f"{adapter}.c_proj.weight", 1),
        }
        for ours, theirs in (("layernorm_pre", "ln_pre"), ("layernorm_post", "ln_post")):
            found |= self.norm(ours, f"{at}.{theirs}")
        for layer in range(vision.num_layers):
            found |= self.vision_layer(f"model.layers.{layer}", f"{at}.transformer.resblocks.{layer}")
        named = {f"vision_model.{name}": tensor for name, tensor in found.items()}
        return named | {"multi_modal_projector.linear_1.weight": self.joined("vision_projection.weight", 0)}

    def vision_layer(self, ours: str, theirs: str) -> dict[str, LazyTensor]:
        found = self.norm(f"{ours}.input_layernorm", f"{theirs}.ln_1")
        found |= self.norm(f"{ours}.post_attention_layernorm", f"{theirs}.ln_2")
        columns = {f"self_attn.{letter}_proj": f"attn.w{letter}" for letter in "qkv"} | {"mlp.fc1": "mlp.c_fc"}
        for name, stored in columns.items():
            for kind in ("weight", "bias"):
                found[f"{ours}.{name}.{kind}"] = self.joined(f"{theirs}.{stored}.{kind}", 0)
        for name, stored in {"self_attn.o_proj": "attn.wo", "mlp.fc2": "mlp.c_proj"}.items():
            found[f"{ours}.{name}.weight"] = self.joined(f"{theirs}.{stored}.weight", 1)
            found[f"{ours}.{name}.bias"] = self.equal(f"{theirs}.{stored}.bias")
        return found

    def norm(self, ours: str, theirs: str) -> dict[str, LazyTensor]:
        return {f"{ours}.{kind}": self.equal(f"{theirs}.{kind}") for kind in ("weight", "bias")}

    def positions(self, at: str, side: int) -> LazyTensor:
        if f"{at}.positional_embedding" not in self.ranks[0]:
            return self.equal(f"{at}.positional_embedding_vlm")
        self.used.add(f"{at}.positional_embedding_vlm")  # the reference overwrites it
        stored = self.equal(f"{at}.positional_embedding")
        return Converted(stored, lambda value: resampled_positions(value, side), stored.shape)


def resampled_positions(stored_PC: Tensor, side: int) -> Tensor:
    """Meta's load hook for position embeddings (llama-models ``vision/encoder.py``).

    The grid is sampled at (x / side, y / side) in a system where -1 and 1 are the outer edges of the corner pixels:
    half a pixel off the pixel centres, with zeros outside. It is not a copy.

    Args:
        stored_PC: class token first, then side · side positions, row-major.
        side: patches along one side.

    Returns:
        Positions row-major, class token last, in the stored type.
    """
    grid_CHW = stored_PC[1:].float().view(side, side, -1).permute(2, 0, 1)
    coordinate = torch.arange(side, dtype=torch.float32) / side * 2 - 1
    y, x = torch.meshgrid(coordinate, coordinate, indexing="ij")
    points = torch.stack((x, y), dim=-1).view(1, side * side, 1, 2)
    sampled = functional.grid_sample(grid_CHW[None], points, padding_mode="zeros", align_corners=False)
    return torch.cat((sampled[0, :, :, 0].T, stored_PC[:1].float())).to(stored_PC.dtype)


def _join(parts: list[LazyTensor], axis: int) -> LazyTensor:
    return parts[0] if len(parts) == 1 else Concat(parts, axis)


def _feed_forward(prefix: str, gate: LazyTensor, up: LazyTensor, down: LazyTensor) -> dict[str, LazyTensor]:
    return {f"{prefix}.gate_proj.weight": gate, f"{prefix}.up_proj.weight": up, f"{prefix}.down_proj.weight": down}
