"""Whether a model gives the answer that was wanted, word by word, as greedy decoding would.

Greedy decoding writes exactly the wanted tokens if and only if each of them is the most likely one after those before
it. So one forward pass over the wanted text tells what generating token by token would, for a tenth of its time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import nn

from .data.encode import Encoded
from .data.packing import IGNORED, Batch, Rows
from .objective import logits_of

BATCH = 64
"""Samples of a forward pass."""


@torch.no_grad()
def exact_matches(model: nn.Module, samples: Sequence[Encoded]) -> list[bool]:
    """Whether greedy decoding would give all learned tokens of each sample, in order.

    Args:
        model: gives logits of a batch; put into evaluation mode while it is evaluated.
        samples: conversations that end with the answer.
    """
    was_training, found = model.training, [False] * len(samples)
    model.eval()
    by_length = defaultdict(list)
    for place, sample in enumerate(samples):
        by_length[len(sample)].append(place)
    for length, places in by_length.items():
        for start in range(0, len(places), BATCH):
            group = places[start : start + BATCH]
            right_answers = _right_answers(model, _rows([samples[p] for p in group], length))
            for place, right in zip(group, right_answers, strict=True):
                found[place] = right
    model.train(was_training)
    return found


def _rows(samples: Sequence[Encoded], length: int) -> Batch:
    """A sample per row: they are all as long as a row."""
    rows = Rows(len(samples), length)
    for sample in samples:
        rows.place(sample)
    return rows.batch(0)


def _right_answers(model: nn.Module, batch: Batch) -> list[bool]:
    right_BT = logits_of(model, batch).argmax(-1) == batch.labels_BT
    answers: list[bool] = (right_BT | (batch.labels_BT == IGNORED)).all(-1).tolist()
    return answers
