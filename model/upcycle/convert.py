"""The conversion itself: the Llama 4 configuration of a dense model, and its tensors one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...errors import HerdError
from ...files import check_output, require_room
from ..checkpoint import save_checkpoint
from ..checkpoint.save import CONFIG
from ..config import HerdConfig, TextConfig
from ..config.names import expected_tensors
from ..config.parameter_counts import model_size
from .dense import DenseModel
from .experts import SHARPNESS, DenseFeedForward, expert_size, mixture_tensors
from .open import open_dense

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_MLP = ("gate_proj", "up_proj", "down_proj")
_SEEDS = 1 << 63


@dataclass(frozen=True)
class UpcycleReport:
    """What was written.

    Attributes:
        output: the checkpoint directory.
        config: configuration of the Llama 4 model.
        mode: ``shared`` or ``split``.
        dtype: of the weights.
        total: all parameters.
        active: parameters that one token uses.
    """

    output: Path
    config: HerdConfig
    mode: str
    dtype: str
    total: int
    active: int

    def to_json(self) -> dict[str, object]:
        """Plain dictionary."""
        return {**asdict(self), "output": str(self.output), "config": self.config.to_json()}


def upcycle(
    source: Path,
    output: Path,
    *,
    experts: int = 4,
    mode: str = "shared",
    moe_every: int = 1,
    seed: int = 0,
    sharpness: float = SHARPNESS,
    drop: float = 0.0,
    dtype: str = "bfloat16",
    overwrite: bool = False,
    on_tensor: Callable[[int, int], None] = lambda _done, _total: None,
) -> UpcycleReport:
    """Write the Llama 4 mixture of experts that computes what a dense Llama-family model computes.

    At most one layer's feed-forward and one tensor of the result are in memory at a time.

    Args:
        source: GGUF file of architecture ``llama``, or Hugging Face directory of ``model_type`` ``llama``.
        output: checkpoint directory to create, with tokenizer and chat template.
        experts: routed experts of a mixture layer.
        mode: ``shared`` keeps the function exactly, ``split`` up to a measured error (see ``experts.py``).
        moe_every: every n-th layer is a mixture, counted from layer n - 1; the others stay dense.
        seed: of new weights.
        sharpness: how decided the routers of split mode are, see ``experts.py``.
        drop: share of the neurons of the routed experts of split mode that are drawn anew, see ``experts.py``.
        dtype: ``bfloat16`` or ``float32``.
        overwrite: replace an existing checkpoint.
        on_tensor: called after each tensor with the number done and the total, for progress.

    Raises:
        HerdError: the source is not such a model, an option is impossible, or the output cannot be written or has
            no room.
    """
    if dtype not in _DTYPES:
        raise HerdError(f"dtype is {dtype!r}, choose one of {', '.join(_DTYPES)}")
    if not 0 <= seed < _SEEDS:
        raise HerdError(f"seed is {seed}, it must be within 0 and {_SEEDS - 1}")
    source, output = Path(source), Path(output)
    check_output(output, overwrite=overwrite, mark=CONFIG, inputs=[source])
    dense = open_dense(source)
    config = target_config(dense, experts=experts, mode=mode, moe_every=moe_every)
    size = model_size(config)
    require_room(output, size.total * _DTYPES[dtype].itemsize, "the checkpoint")
    if sharpness <= 0:
        raise HerdError(f"sharpness is {sharpness}, it must be above 0")
    tensors = upcycled_tensors(dense, config, mode=mode, seed=seed, sharpness=sharpness, drop=drop,
                               dtype=_DTYPES[dtype])
    total = len(expected_tensors(config))
    save_checkpoint(
        output, config, _counted(tensors, lambda done: on_tensor(done, total)), processor_files=dense.processor_files,
        overwrite=overwrite, inputs=[source],
    )
    return UpcycleReport(output, config, mode, dtype, size.total, size.active)


def _counted(
    tensors: Iterator[tuple[str, Tensor]], on_tensor: Callable[[int], None]
) -> Iterator[tuple[str, Tensor]]:
    for done, tensor in enumerate(tensors, 1):
        yield tensor
        on_tensor(done)


def target_config(dense: DenseModel, *, experts: int, mode: str, moe_every: int = 1) -> HerdConfig:
    """Configuration of the Llama 4 model: text only, RoPE and the whole past in every layer.

    Raises:
        HerdError: mode, experts or ``moe_every`` are impossible for this model.
    """
    layers = dense.num_layers
    if not 1 <= moe_every <= layers:
        raise HerdError(f"moe_every is {moe_every}, the model has {layers} layers: choose 1 to {layers}")
    return HerdConfig(text=TextConfig(
        vocab_size=dense.vocab_size,
        hidden_size=dense.hidden_size,
        num_layers=layers,
        num_heads=dense.num_heads,
        num_kv_heads=dense.num_kv_heads,
        head_dim=dense.head_dim,
        expert_size=expert_size(mode, experts, dense.ffn_size),
        dense_size=dense.ffn_size,
        num_experts=experts,
        moe_layers=tuple(range(moe_every - 1, layers, moe_every)),
        rope_layers=(True,) * layers,
        chunked_layers=(False,) * layers,
        # No layer uses it, but transformers builds a mask of this size for every Llama 4 model.
        attention_chunk_size=dense.context,
        rope_theta=dense.rope_theta,
        rope_scaling=dense.rope_scaling,
        rms_norm_eps=dense.rms_norm_eps,
        tie_word_embeddings=dense.tied,
        max_position_embeddings=dense.context,
        bos_token_id=dense.bos_token_id,
        eos_token_ids=dense.eos_token_ids,
        pad_token_id=dense.pad_token_id,
    ))


def upcycled_tensors(
    dense: DenseModel, config: HerdConfig, *, mode: str, seed: int, sharpness: float, dtype: torch.dtype,
    drop: float = 0.0,
) -> Iterator[tuple[str, Tensor]]:
    """Canonical name and value of every tensor of the Llama 4 model, read and converted as they are asked for."""
    generator = torch.Generator().manual_seed(seed)
    text = config.text
    yield "embed_tokens.weight", dense.read("embed_tokens.weight").to(dtype)
    for layer in range(text.num_layers):
        prefix = f"layers.{layer}"
        yield from _outside_feed_forward(dense, prefix, dtype)
        if layer not in text.moe_layers:
            for name in _MLP:
                yield f"{prefix}.feed_forward.{name}.weight", dense.read(f"{prefix}.mlp.{name}.weight").to(dtype)
            continue
        gate, up, down = (dense.read(f"{prefix}.mlp.{name}.weight") for name in _MLP)
        ffn = DenseFeedForward(gate, up, down, norm=dense.read(f"{prefix}.post_attention_layernorm.weight"))
        made = mixture_tensors(ffn, mode=mode, experts=text.num_experts, dtype=dtype, generator=generator,
                               sharpness=sharpness, drop=drop)
        for name, tensor in made:
            yield f"{prefix}.feed_forward.{name}", tensor
    yield "norm.weight", dense.read("norm.weight").to(dtype)
    if not dense.tied:
        yield "lm_head.weight", dense.read("lm_head.weight").to(dtype)


def _outside_feed_forward(dense: DenseModel, prefix: str, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    attention = [f"self_attn.{letter}_proj" for letter in "qkvo"]
    for part in ("input_layernorm", "post_attention_layernorm", *attention):
        name = f"{prefix}.{part}.weight"
        yield name, dense.read(name).to(dtype)
