"""Small training runs: a tiny model, and batches with something to learn. No transformers: workers start quickly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from herdgraph.model.config.presets import TINY
from herdgraph.model.llama4.model import Llama4
from herdgraph.model.training.data import Batch
from herdgraph.model.training.moe.experts import ExpertOptions, prepare_for_training
from herdgraph.model.training.optim import OptimizerOptions

OPTIMIZER = OptimizerOptions(learning_rate=3e-3, warmup=2)


class Fixture:
    """A loader of random batches that knows where it stands."""

    def __init__(self, count: int = 64, rows: int = 2, length: int = 24) -> None:
        generator = torch.Generator().manual_seed(0)
        # Rising runs, so that there is something to learn.
        starts = torch.randint(3, 400, (count, rows, 1), generator=generator)
        self.ids = starts + torch.arange(length)
        self.at = 0
        self.counts: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Batch]:
        while True:
            ids = self.ids[self.at % len(self.ids)]
            self.at += 1
            labels = torch.cat([ids[:, 1:], torch.full((len(ids), 1), -100)], 1)
            yield Batch(ids, labels, torch.zeros_like(ids), None)

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, states: Any) -> None:
        self.at = states[0]["at"]


def model(seed: int = 0) -> Llama4:
    torch.manual_seed(seed)
    return prepare_for_training(Llama4(replace(TINY, vision=None)), ExpertOptions())
