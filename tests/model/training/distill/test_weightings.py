"""Weightings: what defines each, and that the balance keeps its share."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from herdgraph.errors import HerdError
from herdgraph.model.training.distill import (
    Combined,
    DenseTargets,
    Fixed,
    ForwardKL,
    LossRatioBalance,
    Schedule,
    Signals,
    TeacherCertainty,
    TeacherConfidence,
    WeightedSoftLabels,
    Weighting,
    dynamic,
)
from herdgraph.model.training.distill.balance import gradient_sizes

V = 16
ALL = [Fixed(0.3), Schedule(0.9, 0.1, 10), TeacherConfidence(0.8, 2.0), TeacherCertainty(), WeightedSoftLabels(),
       LossRatioBalance(), Combined((TeacherConfidence(), WeightedSoftLabels()), "min", Fixed(0.1)), dynamic(10)]


def _signals(**given: Any) -> Signals:
    """Signals of tokens whose distributions exist: by default both models are uniform."""
    fields = {"teacher_label_N": -math.log(V), "student_label_N": -math.log(V), "teacher_entropy_N": math.log(V),
              "divergence_N": 0.0} | {name: value for name, value in given.items() if name.endswith("_N")}
    rows = max(len(value) if isinstance(value, list) else 1 for value in fields.values())
    tensors = {name: torch.tensor(value if isinstance(value, list) else [value] * rows, dtype=torch.float32)
               for name, value in fields.items()}
    rest = {"temperature": 1.0, "vocabulary": V, "step": 0} | {n: v for n, v in given.items() if not n.endswith("_N")}
    return Signals(**tensors, **rest)


def _of(z: Tensor, t: Tensor, labels: Tensor, temperature: float = 1.0) -> Signals:
    known = DenseTargets(t).knowledge(labels)
    return Signals(known.label_logprob_N, -functional.cross_entropy(z, labels, reduction="none"), known.entropy_N,
                   ForwardKL()(z, DenseTargets(t), temperature), temperature, z.shape[-1], 0)


@pytest.mark.parametrize("weighting", ALL, ids=lambda weighting: type(weighting).__name__)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.sampled_from([0.0, 1.0, 30.0, 1e4]))
def test_weights_are_shares(weighting: Weighting, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    z, t = (scale * torch.randn(6, V, generator=generator) for _ in range(2))
    signals = _of(z, t, torch.randint(0, V, (6,), generator=generator))
    weighting.observe(signals)
    found = weighting(signals)
    assert found.shape == (6,)
    assert found.isfinite().all()
    assert ((found >= 0) & (found <= 1)).all()


def test_fixed() -> None:
    assert Fixed(0.3)(_signals()).tolist() == pytest.approx([0.3])


@pytest.mark.parametrize(("shape", "quarter"), [("linear", 0.7), ("cosine", 0.9 - 0.8 * (1 - math.sqrt(0.5)) / 2)])
def test_a_schedule_goes_from_start_to_end(shape: Any, quarter: float) -> None:
    schedule = Schedule(0.9, 0.1, 8, shape)
    found = [float(schedule(_signals(step=step))) for step in (0, 2, 4, 8, 100)]
    assert found == pytest.approx([0.9, quarter, 0.5, 0.1, 0.1])


def test_confidence_is_what_the_teacher_gives_the_label() -> None:
    signals = _signals(teacher_label_N=[math.log(p) for p in (1.0, 0.5, 1e-6)])
    assert TeacherConfidence()(signals).tolist() == pytest.approx([1.0, 0.5, 1e-6])
    assert TeacherConfidence(0.8, 2.0)(signals).tolist() == pytest.approx([0.8, 0.2, 0.0], abs=1e-6)


def test_certainty_falls_with_entropy_alone() -> None:
    signals = _signals(teacher_entropy_N=[0.0, math.log(4), math.log(V)], teacher_label_N=[-50.0, -50.0, -50.0])
    assert TeacherCertainty()(signals).tolist() == pytest.approx([1.0, 0.5, 0.0], abs=1e-6)
    assert TeacherCertainty(0.5, 2.0)(signals).tolist() == pytest.approx([0.5, 0.125, 0.0], abs=1e-6)


def test_weighted_soft_labels_fade_as_the_student_overtakes_the_teacher() -> None:
    signals = _signals(teacher_label_N=[-1.0] * 4, student_label_N=[-100.0, -1.0, -0.5, 0.0])
    expected = [1.0, 1 - math.exp(-1), 1 - math.exp(-0.5), 0.0]
    assert WeightedSoftLabels()(signals).tolist() == pytest.approx(expected, abs=1e-6)


def test_weighted_soft_labels_with_a_perfect_teacher() -> None:
    signals = _signals(teacher_label_N=[0.0, 0.0], student_label_N=[-1.0, 0.0])
    assert WeightedSoftLabels()(signals).tolist() == pytest.approx([1.0, 0.0])


# -- balance ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_gradient_sizes_are_those_of_the_terms(temperature: float) -> None:
    generator = torch.Generator().manual_seed(3)
    z, t = (2 * torch.randn(32, V, generator=generator) for _ in range(2))
    labels = torch.randint(0, V, (32,), generator=generator)
    soft, hard = gradient_sizes(_of(z, t, labels, temperature))
    leaf = z.clone().requires_grad_()
    exact = torch.autograd.grad(functional.cross_entropy(leaf, labels, reduction="sum"), leaf)[0].abs().sum(-1)
    torch.testing.assert_close(hard, exact, rtol=1e-4, atol=1e-5)
    kl = temperature**2 * ForwardKL()(leaf, DenseTargets(t), temperature).sum()
    exact = torch.autograd.grad(kl, leaf)[0].abs().sum(-1)
    assert (soft >= exact - 1e-5).all()
    assert (soft <= 3 * exact).all()  # a bound that is of use


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_the_balance_converges_to_its_share_and_follows_changes(share: float) -> None:
    balance, generator = LossRatioBalance(share, decay=0.9), torch.Generator().manual_seed(0)
    for scale in (3.0, 0.3):  # a student far from its teacher, then near
        for _ in range(100):
            t, noise = (torch.randn(64, V, generator=generator) for _ in range(2))
            signals = _of(t + scale * noise, t, torch.randint(0, V, (64,), generator=generator))
            balance.observe(signals)
        soft, hard = (size.mean() for size in gradient_sizes(signals))
        weight = balance(signals)
        assert len(set(weight.tolist())) == 1
        part = weight[0] * soft / (weight[0] * soft + (1 - weight[0]) * hard)
        assert float(part) == pytest.approx(share, abs=0.03)


def test_the_first_batch_counts_in_full() -> None:
    balance = LossRatioBalance(0.5, decay=0.99)
    assert float(balance(_signals())) == 0.5  # nothing seen yet
    balance.observe(_signals(divergence_N=[0.02], student_label_N=[math.log(0.5)]))
    assert balance.soft == pytest.approx(0.2, rel=1e-5)
    assert balance.hard == pytest.approx(1.0, rel=1e-5)
    assert float(balance(_signals())) == pytest.approx(1 / 1.2, rel=1e-5)


def test_the_balance_sums_over_ranks() -> None:
    seen: list[list[float]] = []

    def reduce(totals: Tensor) -> Tensor:
        seen.append(totals.tolist())
        return totals + torch.tensor([10.0, 0.0, 3.0])  # another rank's

    balance = LossRatioBalance(reduce=reduce)
    balance.observe(_signals(divergence_N=[0.02], student_label_N=[math.log(0.5)]))
    assert balance.soft == pytest.approx(10.2 / 4, rel=1e-5)
    assert seen == [pytest.approx([0.2, 1.0, 1.0], rel=1e-5)]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_batch_does_not_stay_in_the_means(value: float) -> None:
    balance = LossRatioBalance()
    balance.observe(_signals(student_label_N=[math.nan], divergence_N=[value]))
    assert (balance.soft, balance.hard, balance.batches) == (0, 0, 0)


# -- combined --------------------------------------------------------------------------------------------------------


def test_combined_multiplies_or_takes_the_smallest_above_the_floor() -> None:
    signals = _signals(teacher_label_N=[math.log(0.5), -20.0], student_label_N=[math.log(0.5), -20.0])
    parts = (TeacherConfidence(), WeightedSoftLabels())
    product = Combined(parts, "product", Fixed(0.05))(signals)
    assert product.tolist() == pytest.approx([0.5 * (1 - math.exp(-1)), 0.05])
    assert Combined(parts, "min", Fixed(0.05))(signals).tolist() == pytest.approx([0.5, 0.05])


def test_the_default_keeps_the_teacher_early_and_lets_it_go() -> None:
    wrong = {"teacher_label_N": [-30.0], "student_label_N": [-3.0]}
    early, late = (float(dynamic(100)(_signals(**wrong, step=step))) for step in (0, 100))
    assert early > late > 0
    right = _signals(teacher_label_N=[-0.01], student_label_N=[-3.0], step=100)
    assert float(dynamic(100)(right)) > 0.9


@pytest.mark.parametrize("make", [
    LossRatioBalance, lambda: Combined((TeacherConfidence(), LossRatioBalance()), "min", Fixed(0.1)),
], ids=["alone", "combined"])
def test_what_was_learned_is_saved_as_json_and_restored(make: Callable[[], Weighting]) -> None:
    old, new = make(), make()
    signals = _signals(divergence_N=[0.5, 0.1], student_label_N=[-1.0, -0.2], teacher_label_N=[-0.1, -0.1])
    for _ in range(3):
        old.observe(signals)
    assert not torch.equal(old(signals), new(signals))
    new.load_state_dict(json.loads(json.dumps(old.state_dict())))
    assert torch.equal(old(signals), new(signals))
    old.observe(signals)
    new.observe(signals)
    assert old.state_dict() == new.state_dict()


def test_stateless_kinds_save_nothing() -> None:
    assert Fixed().state_dict() == {}
    Fixed().load_state_dict({})


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Fixed(1.5), "weight is 1.5"), (lambda: Schedule(0, 2, 5), "end is 2"),
    (lambda: Schedule(0, 1, 0), "takes 0 steps"), (lambda: TeacherConfidence(-1), "maximum is -1"),
    (lambda: LossRatioBalance(share=2), "share is 2"), (lambda: replace(LossRatioBalance(), decay=-1), "decay is -1"),
    (lambda: Combined(()), "no parts"),
])
def test_impossible_weightings_are_refused(make: Callable[[], Weighting], message: str) -> None:
    with pytest.raises(HerdError, match=message):
        make()
