"""Weightings: what defines each."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from herdgraph.errors import HerdError
from herdgraph.model.training.distill import Fixed, Responsibility, Schedule, Signals, Weighting

V = 16


def _signals(p: list[float], q: list[float]) -> Signals:
    """What teacher and student give the labels."""
    return Signals(torch.tensor(p).log(), torch.tensor(q).log())


@pytest.mark.parametrize("weighting", [Fixed(0.3), Responsibility(), Responsibility(0.9)], ids=repr)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.sampled_from([0.0, 1.0, 30.0, 1e4]))
def test_weights_are_shares(weighting: Weighting, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    found = weighting(Signals(*((scale * torch.randn(6, V, generator=generator)).log_softmax(-1)[:, 0]
                                for _ in range(2))))
    assert found.shape == (6,)
    assert ((found >= 0) & (found <= 1)).all()


def test_fixed() -> None:
    assert Fixed(0.3)(_signals([0.5], [0.1])).tolist() == pytest.approx([0.3])


def test_a_schedule_follows_the_learning_rate() -> None:
    schedule = Schedule(0.8, lambda step: 1 / (1 + step))
    found = [float(schedule(_signals([0.5], [0.1])._replace(step=step))) for step in (0, 1, 3)]
    assert found == pytest.approx([0.8, 0.4, 0.2])


def test_the_teacher_is_responsible_for_what_it_expects_more_than_the_student() -> None:
    signals = _signals([0.5, 0.2, 1e-6, 0.9], [0.5, 0.8, 0.1, 1 / V])
    assert Responsibility()(signals).tolist() == pytest.approx([0.5, 0.2, 1e-5, 0.935], rel=1e-3)
    assert Responsibility(0.75)(signals)[0].item() == pytest.approx(0.75)


def test_where_labels_come_from_the_mixture_so_does_the_target() -> None:
    """Summed over all labels, each as often as the mixture draws it: a p + (1 - a) y is the mixture."""
    p, q = (torch.randn(V, generator=torch.Generator().manual_seed(seed)).softmax(-1) for seed in (0, 1))
    mixture = 0.7 * p + 0.3 * q
    weights: Tensor = Responsibility(0.7)(Signals(p.log(), q.log()))
    target = (mixture * weights).sum() * p + mixture * (1 - weights)
    torch.testing.assert_close(target, mixture)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Fixed(1.5), "weight is 1.5"), (lambda: Fixed(math.nan), "weight is nan"),
    (lambda: Schedule(2.0, float), "weight is 2.0"),
    (lambda: Responsibility(1.0), "prior is 1.0"), (lambda: Responsibility(0.0), "prior is 0.0"),
])
def test_impossible_weightings_are_refused(make: Callable[[], Weighting], message: str) -> None:
    with pytest.raises(HerdError, match=message):
        make()
