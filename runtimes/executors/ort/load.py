"""From a bundle's graphs to what runs them on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any

import numpy as np

from ....model.config import HerdConfig, TextConfig
from ...bundle.blocks import block_check
from ...bundle.manifest import WEIGHTS, Bundle
from ...kv_cache.sequence import Features
from ..options import ExecutorOptions
from ..runner import Runner
from ..vision import VisionRunner
from .decoder import DecoderGraph, DecoderRunner, Run, SessionGraph
from .paged import PagedRunner
from .session import check_names, create_session
from .weights import is_packed


def load_graphs(bundle: Bundle, options: ExecutorOptions) -> tuple[Runner, VisionRunner | None]:
    """Runners of a bundle's decoder and image graphs.

    Raises:
        HerdError: ONNX Runtime is missing, does not have the bundle's execution provider, or cannot load a graph.
    """
    path = bundle.graph("decoder")
    session = create_session(path, provider=bundle.manifest.provider, options=options)
    config = bundle.manifest.config
    runner = runner_of(SessionGraph(path, session), config, check=_check_of(bundle, path, options),
                       cache_bytes=options.cache_bytes)
    present = {f"present.{layer}.{part}" for layer in range(config.text.num_layers) for part in ("key", "value")}
    inputs = {"input_ids", "past_lengths", "logit_rows"} | ({"image_features"} if config.vision else set())
    if isinstance(runner, PagedRunner):
        inputs |= {"positions", "cumulative_lengths", *runner.tables}
    check_names(session, path, inputs=inputs, outputs={"logits"} | present)
    return runner, load_vision(bundle, options)


def begin_copy(runner: Runner, data: Path, options: ExecutorOptions) -> None:
    """Let packed weights be copied into faster memory; once they are verified, for both would read at the same time."""
    if isinstance(runner, PagedRunner) and options.prepack and is_packed(runner.graph.path):
        runner.copy_weights(data)


def runner_of(
    graph: DecoderGraph, config: HerdConfig, *, batches: int = 1, check: Run | None = None,
    cache_bytes: int | None = None, stages: Items[TextConfig] = (),
) -> PagedRunner | DecoderRunner:
    """The runner that a graph was lowered for: over a list of tokens, or over a batch of sequences side by side.

    Args:
        graph: the decoder.
        config: the model; of a rank, what the rank holds of it.
        batches: batches whose buffers are kept, of the latter.
        check: see ``PagedRunner``.
        cache_bytes: see ``PagedRunner``.
        stages: see ``PagedRunner``.
    """
    if any(item.name == "cumulative_lengths" for item in graph.inputs):
        return PagedRunner(graph, config, cache_bytes=cache_bytes, check=check, stages=stages)
    return DecoderRunner(graph, config, batches=batches, check=check)


def load_vision(bundle: Bundle, options: ExecutorOptions) -> VisionRunner | None:
    """The image tower; None for models that read text only."""
    if not bundle.manifest.config.vision:
        return None
    path = bundle.graph("vision")
    session = create_session(path, provider=bundle.manifest.provider, options=options)
    check_names(session, path, inputs={"pixel_values"}, outputs={"image_features"})
    check = _check_of(bundle, path, options)

    def run(pixel_values: np.ndarray[Any, Any]) -> Features:
        features: Features = session.run(["image_features"], {"pixel_values": pixel_values})[0]
        if check:
            check()
        return features

    return VisionRunner(run, bundle.manifest.config)


def _check_of(bundle: Bundle, graph: Path, options: ExecutorOptions) -> Callable[[], None] | None:
    """What compares the weights that a call of a graph has read, None when nothing is to be compared."""
    return block_check([bundle.block_hashes(graph.with_suffix(WEIGHTS))]) if options.check_blocks else None
