"""The image tower run layer by layer over all tiles, like the decoder (``stream.py``)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..model.checkpoint.reader import TensorReader
from ..model.llama4.model import constants
from ..model.llama4.vision import VisionLayer, VisionTower
from .matmul_backends import MatmulBackend, name_linears, set_backend
from .stream import loaded

TILES = 4
"""Tiles of one call."""


class VisionStream:
    """The tower, adapter and projector of a checkpoint, a layer at a time, in float32."""

    def __init__(self, source: TensorReader) -> None:
        self.source = source
        with torch.device("meta"):
            self._tower = VisionTower(source.config)
        name_linears(self._tower)
        for name, value in constants(source.config, self._tower).items():
            owner, _, attribute = name.rpartition(".")
            setattr(self._tower.get_submodule(owner), attribute, value)

    def features(
        self, pixels_NCHW: Tensor, backend: MatmulBackend, on_layer: Callable[[], None] = lambda: None
    ) -> Tensor:
        """Features of all tiles, [N · tokens per tile, D].

        Args:
            pixels_NCHW: float32 tiles.
            backend: computes the matrix products.
            on_layer: called after every layer, for progress.
        """
        set_backend(self._tower, backend)
        tower, layers = self._tower.vision_model, self._tower.vision_model.model.layers
        with loaded(self._tower, self.source, "", without=".layers."):
            x_NPC = torch.cat([tower.embed(tiles) for tiles in pixels_NCHW.split(TILES)])
            for index, layer in enumerate(layers):
                assert isinstance(layer, VisionLayer)
                with loaded(layer, self.source, f"vision_model.model.layers.{index}."):
                    x_NPC = torch.cat([layer(tiles, *tower.rotary(len(tiles))) for tiles in x_NPC.split(TILES)])
                on_layer()
            adapted = [self._tower.multi_modal_projector(tower.adapt(tiles)) for tiles in x_NPC.split(TILES)]
        return torch.cat(adapted).flatten(0, 1)
