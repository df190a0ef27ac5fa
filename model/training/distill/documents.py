"""The samples of a packed batch, one by one, as a teacher that knows nothing of packing sees them.

Attention stays inside of a document and positions begin anew with each (``data/packing.py``). So a teacher's targets
for a document are the same wherever it is packed, and a cache holds documents, not rows: another batch size, shuffle or
number of ranks uses the same cache. A document that was cut at another place has other ids and is another document.

Shapes: B rows, T tokens, L tokens of a document, P tiles.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ....errors import HerdError
from ...config import HerdConfig
from ..data.packing import IGNORED, PADDING, Batch


@dataclass(frozen=True)
class Document:
    """One sample.

    Attributes:
        start: its first token among all B · T of the batch.
        ids_L: tokens.
        labels_L: next tokens, ``IGNORED`` where nothing is learned.
        tiles_PCHW: its tiles, None without pictures.
    """

    start: int
    ids_L: Tensor
    labels_L: Tensor
    tiles_PCHW: Tensor | None

    @cached_property
    def learned(self) -> Tensor:
        """Places of its labelled tokens inside of it."""
        return (self.labels_L != IGNORED).nonzero()[:, 0].cpu()

    @cached_property
    def key(self) -> bytes:
        """Hash of its tokens."""
        return _digest(self.ids_L.int())

    @cached_property
    def labels_key(self) -> bytes:
        """Hash of its labels."""
        return _digest(self.labels_L.int())

    @cached_property
    def tiles_key(self) -> bytes:
        """Hash of its tiles: equal tokens do not mean equal pictures."""
        return _digest(self.tiles_PCHW.float()) if self.tiles_PCHW is not None else bytes(32)

    @property
    def identity(self) -> bytes:
        """What makes it another document: the caption of two pictures is two documents."""
        return self.key + self.tiles_key


def documents(batch: Batch, config: HerdConfig) -> Iterator[Document]:
    """The documents of a batch that have something to learn, in order.

    Args:
        batch: packed rows.
        config: says which tokens stand for tiles.

    Raises:
        HerdError: the batch has another number of tiles than its image tokens stand for.
    """
    ids_N, labels_N, tiles = batch.input_ids_BT.flatten(), batch.labels_BT.flatten(), batch.pixels_NCHW
    per_tile = config.vision.tokens_per_tile if config.vision else 0
    used = 0
    for start, end in spans(batch.document_BT):
        images = int((ids_N[start:end] == config.image_token_id).sum()) if per_tile else 0
        count = images // per_tile if per_tile else 0
        own = tiles[used : used + count] if tiles is not None and count else None
        used += count
        document = Document(start, ids_N[start:end], labels_N[start:end], own)
        if len(document.learned):
            yield document
    found = 0 if tiles is None else len(tiles)
    if found != used:
        raise HerdError(f"the batch has {found} tiles, its image tokens stand for {used}: is the configuration another "
                        "model's?")


def spans(document_BT: Tensor) -> list[tuple[int, int]]:
    """First and last (exclusive) place, among all B · T, of each run of equal document numbers but padding."""
    row_BT = torch.arange(len(document_BT), device=document_BT.device)[:, None].expand_as(document_BT)
    pairs, counts = torch.unique_consecutive(
        torch.stack((row_BT.flatten(), document_BT.flatten()), -1), dim=0, return_counts=True
    )
    ends = counts.cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    return [(a, b) for a, b, number in zip(starts, ends, pairs[:, 1].tolist(), strict=True) if number != PADDING]


def _digest(tensor: Tensor) -> bytes:
    whole = tensor.detach().cpu().contiguous()
    return hashlib.sha256(f"{tuple(whole.shape)}".encode() + whole.numpy().tobytes()).digest()
