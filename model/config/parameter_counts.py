"""Numbers that follow from a configuration: parameters, and key/value bytes per token. Torch-free."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from .config import HerdConfig
from .names import expected_tensors


@dataclass(frozen=True)
class ModelSize:
    """Parameter counts, and bytes of keys and values.

    Attributes:
        total: all parameters.
        active: parameters that one text token uses: all but the image tower and the experts that are not chosen
            (both vocabulary matrices counted).
        routed: parameters of routed experts.
        vision: image tower, adapter and projector.
        kv_global_bytes: per token, in layers that keep every token.
        kv_local_bytes: per token, in chunked layers, up to their chunk.
        kv_local_cap_bytes: all that chunked layers ever hold.
    """

    total: int
    active: int
    routed: int
    vision: int
    kv_global_bytes: int
    kv_local_bytes: int
    kv_local_cap_bytes: int

    def to_json(self) -> dict[str, int]:
        """Plain dictionary."""
        return asdict(self)


def model_size(config: HerdConfig, *, kv_row_bytes: int | None = None) -> ModelSize:
    """Count the parameters of a configuration, and the bytes of its keys and values.

    Args:
        config: the model.
        kv_row_bytes: of a token's keys in one head, and as many of its values; None for 16 bits an element.
    """
    sizes = {name: math.prod(shape) for name, shape in expected_tensors(config).items()}
    total = sum(sizes.values())
    routed = sum(size for name, size in sizes.items() if ".experts." in name)
    vision = sum(size for name, size in sizes.items() if name.startswith(("vision_model.", "multi_modal_projector.")))
    text = config.text
    chosen = routed * text.top_k // text.num_experts if routed else 0
    per_layer = 2 * text.num_kv_heads * (2 * text.head_dim if kv_row_bytes is None else kv_row_bytes)
    local = sum(1 for layer in range(text.num_layers) if text.chunk_of(layer))
    return ModelSize(
        total=total,
        active=total - vision - routed + chosen,
        routed=routed,
        vision=vision,
        kv_global_bytes=per_layer * (text.num_layers - local),
        kv_local_bytes=per_layer * local,
        kv_local_cap_bytes=per_layer * local * text.attention_chunk_size,
    )
