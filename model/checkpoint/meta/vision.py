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
from .tensor_parallel_files import TensorParallelFiles

_ENCODER = "vision_embeddings.vision_encoder"
_ADAPTER = "vision_embeddings.vision_adapter.mlp"
_COLUMN_PARALLEL = {
    "self_attn.q_proj": "attn.wq", "self_attn.k_proj": "attn.wk", "self_attn.v_proj": "attn.wv", "mlp.fc1": "mlp.c_fc",
}
_ROW_PARALLEL = {"self_attn.o_proj": "attn.wo", "mlp.fc2": "mlp.c_proj"}
_BLOCK_NORMS = {"input_layernorm": "ln_1", "post_attention_layernorm": "ln_2"}


def vision_tensors(files: TensorParallelFiles, vision: VisionConfig) -> dict[str, LazyTensor]:
    """The image tower and its projection under canonical names.

    Raises:
        HerdError: a tensor is missing.
    """
    found = {
        "class_embedding": files.equal(f"{_ENCODER}.class_embedding"),
        "positional_embedding_vlm": _positions(files, vision.patches_per_side),
        "patch_embedding.linear.weight": files.rows(f"{_ENCODER}.conv1._linear.weight"),
        "vision_adapter.mlp.fc1.weight": files.rows(f"{_ADAPTER}.c_fc.weight"),
        "vision_adapter.mlp.fc2.weight": files.columns(f"{_ADAPTER}.c_proj.weight"),
    }
    found |= _norms(files, {"layernorm_pre": f"{_ENCODER}.ln_pre", "layernorm_post": f"{_ENCODER}.ln_post"})
    for layer in range(vision.num_layers):
        found |= _block(files, f"model.layers.{layer}", f"{_ENCODER}.transformer.resblocks.{layer}")
    named = {f"vision_model.{name}": tensor for name, tensor in found.items()}
    return named | {"multi_modal_projector.linear_1.weight": files.rows("vision_projection.weight")}


def _block(files: TensorParallelFiles, ours: str, theirs: str) -> dict[str, LazyTensor]:
    found = _norms(files, {f"{ours}.{name}": f"{theirs}.{stored}" for name, stored in _BLOCK_NORMS.items()})
    for name, stored in _COLUMN_PARALLEL.items():
        for kind in ("weight", "bias"):
            found[f"{ours}.{name}.{kind}"] = files.rows(f"{theirs}.{stored}.{kind}")
    for name, stored in _ROW_PARALLEL.items():
        found[f"{ours}.{name}.weight"] = files.columns(f"{theirs}.{stored}.weight")
        found[f"{ours}.{name}.bias"] = files.equal(f"{theirs}.{stored}.bias")
    return found


def _norms(files: TensorParallelFiles, names: dict[str, str]) -> dict[str, LazyTensor]:
    kinds = ("weight", "bias")
    return {f"{ours}.{kind}": files.equal(f"{theirs}.{kind}") for ours, theirs in names.items() for kind in kinds}


def _positions(files: TensorParallelFiles, side: int) -> LazyTensor:
    if not files.has(f"{_ENCODER}.positional_embedding"):
        return files.equal(f"{_ENCODER}.positional_embedding_vlm")
    files.skip(f"{_ENCODER}.positional_embedding_vlm")  # the reference overwrites it
    stored = files.equal(f"{_ENCODER}.positional_embedding")
    return Converted(stored, lambda value: resampled_positions(value, side), stored.shape)
