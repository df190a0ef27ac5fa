"""Running bundles, without torch: the bundle format, executors, sampling, generation."""

from .bundle.manifest import Bundle, Manifest
from .engine import Engine
from .generation import Generation, Sampling, TextStream, Timings, TokenLogprob
from .kv_cache.sequence import Sequence

__all__ = [
    "Bundle", "Engine", "Generation", "Manifest", "Sampling", "Sequence", "TextStream", "Timings", "TokenLogprob",
]
