"""From a bundle's graphs to what runs them on ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...bundle.manifest import Bundle
from ...kv_cache.sequence import Features
from ..options import ExecutorOptions
from ..vision import VisionRunner
from .decoder import DecoderRunner, SessionGraph
from .session import create_session


def load_graphs(bundle: Bundle, options: ExecutorOptions) -> tuple[DecoderRunner, VisionRunner | None]:
    """Runners of a bundle's decoder and image graphs.

    Raises:
        HerdError: ONNX Runtime is missing, does not have the bundle's execution provider, or cannot load a graph.
    """
    path = bundle.graph("decoder")
    session = create_session(path, provider=bundle.manifest.provider, options=options)
    return DecoderRunner(SessionGraph(path, session), bundle.manifest.config), load_vision(bundle, options)


def load_vision(bundle: Bundle, options: ExecutorOptions) -> VisionRunner | None:
    """The image tower; None for models that read text only."""
    if not bundle.manifest.config.vision:
        return None
    session = create_session(bundle.graph("vision"), provider=bundle.manifest.provider, options=options)

    def run(pixel_values: np.ndarray[Any, Any]) -> Features:
        features: Features = session.run(None, {"pixel_values": pixel_values})[0]
        return features

    return VisionRunner(run, bundle.manifest.config)
