"""From logits to text: sampling, stop conditions, the generation loop."""

from .prefix import shared_prefix
from .sampling import Sampling, TokenLogprob
from .stop_strings import StopRule
from .stream import Generation, TextStream, Timings

__all__ = ["Generation", "Sampling", "StopRule", "TextStream", "Timings", "TokenLogprob", "shared_prefix"]
