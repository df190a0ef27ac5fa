"""Meta's names of the image tower's tensors (llama-models ``vision/embedding.py`` and ``vision/encoder.py``).

Weights keep their layout: ``conv1._linear`` and transformers' ``patch_embedding.linear`` both follow an ``Unfold``
(channel, row, column), and both rotate interleaved pairs. Biases of column-parallel layers are cut like their rows,
those of row-parallel layers are equal on all ranks.
"""

from __future__ import annotations

from ...config import VisionConfig
from ..tensors.lazy import LazyTensor
from ..tensors.views import Converted
from .positions import resampled_positions
from .ranks import TensorParallelFiles

_ENCODER = "vision_embeddings.vision_encoder"
_ADAPTER = "vision_embeddings.vision_adapter.mlp"
_COLUMN_PARALLEL = {
    "self_attn.q_proj": "attn.wq", "self_attn.k_proj": "attn.wk", "self_attn.v_proj": "attn.wv", "mlp.fc1": "mlp.c_fc",
}
_ROW_PARALLEL = {"self_attn.o_proj": "attn.wo", "mlp.fc2": "mlp.c_proj"}
_BLOCK_NORMS = {"input_layernorm": "ln_1", "post_attention_layernorm": "ln_2"}


def vision_tensors(ranks: TensorParallelFiles, vision: VisionConfig) -> dict[str, LazyTensor]:
    """The image tower and its projection under canonical names.

    Raises:
        HerdError: a tensor is missing.
    """
    found = {
        "class_embedding": ranks.equal(f"{_ENCODER}.class_embedding"),
        "positional_embedding_vlm": _positions(ranks, vision.patches_per_side),
        "patch_embedding.linear.weight": ranks.rows(f"{_ENCODER}.conv1._linear.weight"),
        "vision_adapter.mlp.fc1.weight": ranks.rows(f"{_ADAPTER}.c_fc.weight"),
        "vision_adapter.mlp.fc2.weight": ranks.columns(f"{_ADAPTER}.c_proj.weight"),
    }
    found |= _norms(ranks, {"layernorm_pre": f"{_ENCODER}.ln_pre", "layernorm_post": f"{_ENCODER}.ln_post"})
    for layer in range(vision.num_layers):
        found |= _block(ranks, f"model.layers.{layer}", f"{_ENCODER}.transformer.resblocks.{layer}")
    named = {f"vision_model.{name}": tensor for name, tensor in found.items()}
    return named | {"multi_modal_projector.linear_1.weight": ranks.rows("vision_projection.weight")}


def _block(ranks: TensorParallelFiles, ours: str, theirs: str) -> dict[str, LazyTensor]:
    found = _norms(ranks, {f"{ours}.{name}": f"{theirs}.{stored}" for name, stored in _BLOCK_NORMS.items()})
    for name, stored in _COLUMN_PARALLEL.items():
        for kind in ("weight", "bias"):
            found[f"{ours}.{name}.{kind}"] = ranks.rows(f"{theirs}.{stored}.{kind}")
    for name, stored in _ROW_PARALLEL.items():
        found[f"{ours}.{name}.weight"] = ranks.columns(f"{theirs}.{stored}.weight")
        found[f"{ours}.{name}.bias"] = ranks.equal(f"{theirs}.{stored}.bias")
    return found


def _norms(ranks: TensorParallelFiles, names: dict[str, str]) -> dict[str, LazyTensor]:
    kinds = ("weight", "bias")
    return {f"{ours}.{kind}": ranks.equal(f"{theirs}.{kind}") for ours, theirs in names.items() for kind in kinds}


def _positions(ranks: TensorParallelFiles, side: int) -> LazyTensor:
    if not ranks.has(f"{_ENCODER}.positional_embedding"):
        return ranks.equal(f"{_ENCODER}.positional_embedding_vlm")
    ranks.skip(f"{_ENCODER}.positional_embedding_vlm")  # the reference overwrites it
    stored = ranks.equal(f"{_ENCODER}.positional_embedding")
    return Converted(stored, lambda value: resampled_positions(value, side), stored.shape)
