"""From logits to text: sampling, stop conditions, the generation loop."""

from .asked import Asked
from .request import Request
from .sampling import Sampling, TokenLogprob
from .stop_strings import StopRule
from .stream import Generation, TextStream, Timings

__all__ = ["Asked", "Generation", "Request", "Sampling", "StopRule", "TextStream", "Timings", "TokenLogprob"]
