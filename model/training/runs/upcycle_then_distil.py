"""A dense model becomes a mixture of experts, and learns from its former self until its experts differ.

Upcycling keeps the function and gives every expert the same neurons; the dense original, as teacher, then tells the
mixture what it lost and what its experts are for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ...data.heartbeat import Heartbeat
from ...upcycle import upcycle
from ..state import TrainProgress
from .distil import DistilOptions, distil
from .run import OnStep

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class UpcycleOptions(DistilOptions):
    """Upcycling, then distillation.

    Attributes:
        checkpoint: the dense model: a GGUF file or a Hugging Face directory.
        teacher: directory of another teacher than the dense model, or of a cache of its targets.
        num_experts: routed experts of a layer.
        mode: shared: routed experts start silent; split: they carry half of the feed-forward.
        sharpness: of the routers of ``split``: they begin less decided than those of a model that only serves, and can
            learn for it.
    """

    num_experts: int = 4
    mode: Literal["shared", "split"] = "split"
    sharpness: float = 10.0


def upcycle_then_distil(options: UpcycleOptions, on_step: OnStep | None = None) -> TrainProgress:
    """Upcycle a dense model and distil it from itself; ``teacher`` may name another."""
    dense, mixture = options.output / "dense", options.output / "upcycled"
    options.output.mkdir(parents=True, exist_ok=True)
    if not (mixture / "config.json").is_file():
        upcycle(options.checkpoint, mixture, experts=options.num_experts, mode=options.mode,
                sharpness=options.sharpness, on_tensor=_told(mixture))
    if options.teacher is None and not (dense / "config.json").is_file():
        # With silent routed experts an upcycled model is the dense one, with the same tokenizer.
        upcycle(options.checkpoint, dense, experts=2, mode="shared", on_tensor=_told(dense))
    return distil(replace(options, checkpoint=mixture, teacher=options.teacher or dense), on_step)


def _told(directory: Path) -> Callable[[int, int], None]:
    logger.info("upcycling the dense model to %s", directory)
    return Heartbeat(f"writing {directory}, tensor").tick
