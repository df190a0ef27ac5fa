"""What a Llama 4 model is, in numbers: configuration, tensor names and shapes, presets, sizes, shard plans.

Torch-free: a runtime on an edge box reads it.
"""

from __future__ import annotations

from .config import HerdConfig, RopeScaling, TextConfig, VisionConfig
from .huggingface import from_hf, to_hf
from .meta import from_meta
from .read import read_config

__all__ = [
    "HerdConfig", "RopeScaling", "TextConfig", "VisionConfig", "from_hf", "from_meta", "read_config", "to_hf",
]
