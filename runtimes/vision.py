"""Runs the image graph on tiles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..errors import HerdError
from ..model.config import HerdConfig, VisionConfig
from .ort import Memory, create_session
from .sequence import Features

TILES_PER_CALL = 4
"""Tiles in one call: enough to fill the matrix products, few enough to bound the memory of activations."""


class VisionRunner:
    """The image tower of a bundle on ONNX Runtime."""

    def __init__(self, graph: Path, config: HerdConfig, *, threads: int | None, memory: Memory = "fast") -> None:
        assert config.vision is not None, "a bundle with an image graph has an image configuration"
        self.config: VisionConfig = config.vision
        self.width = config.text.hidden_size
        self.session = create_session(graph, threads=threads, memory=memory)

    def features(self, pixel_values: np.ndarray[Any, Any]) -> Features:
        """Tiles [N, 3, H, W], normalised float32, to features [N · tokens per tile, width].

        Raises:
            HerdError: another shape or type.
        """
        side, channels = self.config.image_size, self.config.num_channels
        wanted = f"float32 [tiles, {channels}, {side}, {side}]"
        if pixel_values.dtype != np.float32 or pixel_values.shape[1:] != (channels, side, side):
            raise HerdError(f"pixel_values is {pixel_values.dtype} {list(pixel_values.shape)}, {wanted} is needed")
        parts = [
            self.session.run(None, {"pixel_values": pixel_values[first : first + TILES_PER_CALL]})[0]
            for first in range(0, len(pixel_values), TILES_PER_CALL)
        ]
        return np.concatenate(parts) if parts else np.zeros((0, self.width), np.float32)
