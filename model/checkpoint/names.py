"""Hugging Face's tensor names to canonical ones and back.

Canonical names, shapes included, are defined in ``model.config.names``; files add the prefixes of the class that wrote
them.
"""

from __future__ import annotations

from ..config import HerdConfig

_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.")
_BUFFERS = ("rotary_emb.inv_freq", "rotary_embedding.freqs_ci", "rope.freqs", "_extra_state")
_IMAGE_TOWER = ("vision_model.", "multi_modal_projector.")


def canonical_name(stored: str) -> str:
    """Name without the prefixes of transformers' classes.

    Args:
        stored: as in the file, of a text-only or a multimodal model, of any transformers version.
    """
    prefix = next((prefix for prefix in _PREFIXES if stored.startswith(prefix)), "")
    return stored.removeprefix(prefix)


def stored_name(canonical: str, config: HerdConfig) -> str:
    """The name under which transformers stores a canonical tensor of this model; ``canonical_name`` inverts it."""
    if canonical.startswith(_IMAGE_TOWER):
        return canonical
    inner = canonical if canonical.startswith("lm_head.") else f"model.{canonical}"
    return f"language_model.{inner}" if config.vision else inner


def is_buffer(stored: str) -> bool:
    """Whether a stored tensor is none of the model's weights: rotary tables and the state of training engines."""
    return stored.endswith(_BUFFERS)
