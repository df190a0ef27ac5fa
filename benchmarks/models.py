"""Random-weight members of the herd that speed is measured on, as Hugging Face checkpoints.

    python -m benchmarks.models NAME OUT_DIR [--experts N] [--calibration DIRECTORY]

================  ==========  ================================================================
scout-mini        1.50 B      16 layers, 16 experts in every layer, iRoPE, qk-norm; text
maverick-mini     1.47 B      12 layers, 128 experts in every second layer; text
scout-mini-mm     1.54 B      scout-mini with an 8-layer tower for 336-pixel tiles
scout-slice       6.48 B      two layers of Scout at their real size, with its vocabulary; text; 13 GB
maverick-slice    18.7 B      a dense layer and one with 128 experts of Maverick, as scout-slice; 37 GB
================  ==========  ================================================================

``--experts`` writes fewer of them: what is measured by parameter, by token or by matrix is the same with a part of the
experts (maverick-slice with 8 is 3.5 B and 7 GB), what depends on how many there are is not.

Values are seeded and scaled by fan-in (residual outputs by 1/sqrt(2L)), so that logits are of order one. Experts
differ from each other: equal experts would make caches lie. The calibration is measured on random tokens, for bundles
with 8-bit keys and values.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from herdgraph.calibration.calibrate import Options, calibrate
from herdgraph.calibration.windows import Data, Window
from herdgraph.model.checkpoint import open_checkpoint, save_checkpoint
from herdgraph.model.config import HerdConfig, RopeScaling, TextConfig, VisionConfig
from herdgraph.model.config.names import expected_tensors

from .vocabulary import write_processor


def _irope(layers: int) -> tuple[bool, ...]:
    return tuple((layer + 1) % 4 != 0 for layer in range(layers))


_SCOUT = TextConfig(
    vocab_size=32768, hidden_size=1024, num_layers=16, num_heads=8, num_kv_heads=2, head_dim=128, expert_size=1664,
    dense_size=3328, num_experts=16, top_k=1, moe_layers=tuple(range(16)), rope_layers=_irope(16),
    chunked_layers=_irope(16), attention_chunk_size=8192, rope_scaling=RopeScaling(), use_qk_norm=True,
    attn_temperature_tuning=True, max_position_embeddings=1 << 20, bos_token_id=1, eos_token_ids=(2,), pad_token_id=0,
)
_MAVERICK = replace(
    _SCOUT, hidden_size=768, expert_size=768, dense_size=2304, num_layers=12, num_heads=6, num_experts=128,
    moe_layers=tuple(range(1, 12, 2)), rope_layers=_irope(12), chunked_layers=_irope(12), use_qk_norm=False,
    rope_scaling=None,
)
_SLICE = replace(
    _SCOUT, vocab_size=202_048, hidden_size=5120, num_layers=2, num_heads=40, num_kv_heads=8, expert_size=8192,
    dense_size=16384, moe_layers=(0, 1), rope_layers=(True, False), chunked_layers=(True, False),
)
_MAVERICK_SLICE = replace(_SLICE, num_experts=128, moe_layers=(1,), use_qk_norm=False, rope_scaling=None)
_TOWER = VisionConfig(
    hidden_size=512, num_layers=8, num_heads=8, intermediate_size=2048, image_size=336, patch_size=14,
    adapter_hidden_size=1024, adapter_output_size=1024,
)

MODELS = {
    "scout-mini": HerdConfig(text=_SCOUT),
    "maverick-mini": HerdConfig(text=_MAVERICK),
    "scout-mini-mm": HerdConfig(text=_SCOUT, vision=_TOWER, image_token_id=32702, begin_image_token_id=32700,
                                end_image_token_id=32701),
    "scout-slice": HerdConfig(text=_SLICE), "maverick-slice": HerdConfig(text=_MAVERICK_SLICE),
}


def tensors(config: HerdConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Seeded bf16 weights, one tensor at a time."""
    generator = torch.Generator().manual_seed(1234)
    for name, shape in expected_tensors(config).items():
        if len(shape) == 1 and "class_embedding" not in name:
            yield name, torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=torch.bfloat16)
            continue
        fan_in = shape[1] if ".experts." in name else shape[-1]
        scale = 1.0 if "embed_tokens" in name else 0.02 if "embedding" in name else fan_in**-0.5
        if any(part in name for part in ("o_proj", "down_proj", "fc2")):
            scale *= (2 * config.text.num_layers) ** -0.5
        yield name, torch.empty(shape).normal_(0, scale, generator=generator).bfloat16()


def write(name: str, directory: Path, experts: int | None = None) -> None:
    """Write a model, or one with fewer experts, unless it is there already."""
    config = MODELS[name]
    if experts is not None:
        config = replace(config, text=replace(config.text, num_experts=experts))
    if not directory.exists():
        save_checkpoint(directory, config, tensors(config))
        write_processor(directory, config.text.vocab_size)


def calibrated(directory: Path, output: Path) -> None:
    """Calibrate a model on four windows of random tokens, for bundles with 8-bit keys and values."""
    with open_checkpoint(directory) as checkpoint:
        windows = torch.randint(0, 32000, (4, 512), generator=torch.Generator().manual_seed(0)).tolist()
        calibrate(checkpoint, output, Data([Window(ids) for ids in windows], []), Options(hessians=False))


def main() -> None:
    """Parse the command line and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--experts", type=int, help="write only so many; default: all")
    parser.add_argument("--calibration", type=Path)
    args = parser.parse_args()
    write(args.name, args.out, args.experts)
    if args.calibration:
        calibrated(args.out, args.calibration)


if __name__ == "__main__":
    main()
