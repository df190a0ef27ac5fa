"""Where targets come from: a module in this process, a compiled engine, or a cache on disk.

Shapes: B rows, T tokens, N = B · T, L tokens of a document, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ....errors import HerdError
from ...config import HerdConfig
from ..data.packing import Batch
from .cache import TargetCache
from .documents import documents
from .targets import DenseTargets, Targets, join

Array = np.ndarray[Any, Any]


class Teacher(Protocol):
    """Anything that has targets for a batch."""

    def targets(self, batch: Batch) -> Targets:
        """Targets of all B · T tokens on the batch's device; rows without a label may hold anything."""


class ModuleTeacher:
    """A torch module in this process, in evaluation mode while it answers. It may be in training meanwhile.

    Args:
        module: the teacher.
        logits_of: gives the module's logits [B, T, V] of a batch (``objective.logits_of``).
    """

    def __init__(self, module: nn.Module, logits_of: Callable[[nn.Module, Batch], Tensor]) -> None:
        self._module, self._logits_of = module, logits_of

    @torch.no_grad()
    def targets(self, batch: Batch) -> Targets:
        """See ``Teacher``."""
        was_training = self._module.training
        targets = DenseTargets(self._logits_of(self._module.eval(), batch).flatten(0, 1))
        self._module.train(was_training)
        return targets


class Engine(Protocol):
    """What a compiled teacher must offer: ``runtimes.Engine`` does. This room must not import that one."""

    @property
    def config(self) -> HerdConfig:
        """The teacher's configuration."""

    def new_sequence(self) -> Any:
        """An empty sequence."""

    def prefill(
        self, sequence: Any, token_ids: Sequence[int], pixel_values: Array | None = None, *, all_positions: bool = False
    ) -> Array:
        """Append tokens; float32 logits [L, V] of all of them."""


class EngineTeacher:
    """A bundle as teacher: quantised, on another executor, without its torch weights in memory.

    Each document runs as a sequence of its own, as it was packed to be seen. Documents without labels do not run.

    Args:
        engine: loaded bundle.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def targets(self, batch: Batch) -> Targets:
        """See ``Teacher``.

        Raises:
            HerdError: the batch's ids or tiles are not this teacher's.
        """
        config = self._engine.config
        logits_NV = torch.zeros(batch.input_ids_BT.numel(), config.text.vocab_size)
        for document in documents(batch, config):
            tiles = document.tiles_PCHW
            pixels = None if tiles is None else tiles.detach().float().cpu().numpy()
            ids = document.ids_L.tolist()
            found_LV = self._engine.prefill(self._engine.new_sequence(), ids, pixels, all_positions=True)
            logits_NV[document.start : document.start + len(ids)] = torch.from_numpy(found_LV)
        return DenseTargets(logits_NV.to(batch.input_ids_BT.device))


class CachedTeacher:
    """Targets that another run has kept on disk.

    Args:
        cache: opened for the student's tokenizer.
        config: the student's, to tell which tokens stand for tiles.
    """

    def __init__(self, cache: TargetCache, config: HerdConfig) -> None:
        if cache.spec.vocabulary != config.text.vocab_size:
            raise HerdError(f"the cache {cache.directory} is of a teacher with {cache.spec.vocabulary} ids, the "
                            f"student has {config.text.vocab_size}: they need the same tokenizer")
        self._cache, self._config = cache, config

    def targets(self, batch: Batch) -> Targets:
        """See ``Teacher``.

        Raises:
            HerdError: a document is not in the cache, was labelled otherwise or has other pictures, or its shard is
                damaged.
        """
        found = [(document.start + document.learned, self._cache.read(document))
                 for document in documents(batch, self._config)]
        count, device = batch.input_ids_BT.numel(), batch.input_ids_BT.device
        places_M = torch.cat([places for places, _ in found]) if found else torch.zeros(0, dtype=torch.int64)
        kept = join([targets for _, targets in found]) if found else self._cache.nothing()
        return kept.map(lambda rows_MX: _spread(rows_MX, places_M, count).to(device))


def _spread(rows_MX: Tensor, places_M: Tensor, count: int) -> Tensor:
    """Rows at their places among ``count``, zeros elsewhere."""
    return rows_MX.new_zeros(count, *rows_MX.shape[1:]).index_copy(0, places_M, rows_MX)
