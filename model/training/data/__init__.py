"""Early-fusion data: files -> samples -> tokens and tiles -> packed batches.

``open_samples`` reads samples, ``hold_out`` splits them, ``Encoder`` makes tokens of them and ``Loader`` batches:

    train, held_out = hold_out(open_samples([Path("data")]), 0.01)
    encoder = Encoder(checkpoint, config, max_tokens=2048, too_long="cut")
    for batch in Loader(train, encoder, rows=8, seq_len=2048, rank=rank, world=world): ...
"""

from __future__ import annotations

from ...data.records import Picture, Record, Turn, record_of
from ...data.sources import Joined, JsonLines, Samples, SavedDataset, Subset, hold_out, open_samples
from ...data.tar_shards import TarShard
from .encode import Encoded, Encoder
from .loader import Loader
from .packing import IGNORED, PADDING, Batch, Rows

__all__ = [
    "IGNORED", "PADDING", "Batch", "Encoded", "Encoder", "Joined", "JsonLines", "Loader", "Picture", "Record", "Rows",
    "Samples", "SavedDataset", "Subset", "TarShard", "Turn", "hold_out", "open_samples", "record_of",
]
