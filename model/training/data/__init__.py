"""Early-fusion data: samples (``model/data``) -> tokens and tiles -> packed batches.

``Encoder`` makes tokens of samples and ``Loader`` batches:

    train, held_out = hold_out(open_samples([Path("data")]), 0.01)
    encoder = Encoder(checkpoint, config, max_tokens=2048, too_long="cut")
    for batch in Loader(train, encoder, rows=8, seq_len=2048, rank=rank, world=world): ...
"""

from __future__ import annotations

from .encode import Encoded, Encoder
from .loader import Loader
from .packing import IGNORED, PADDING, Batch, Rows

__all__ = ["IGNORED", "PADDING", "Batch", "Encoded", "Encoder", "Loader", "Rows"]
