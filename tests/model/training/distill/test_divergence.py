"""The divergence: values and gradients against a float64 formula, its defining properties, and sparse teachers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from herdgraph.errors import HerdError
from herdgraph.model.training.distill import DenseTargets, TopK, forward_kl


def _logits(rows: int = 5, vocabulary: int = 11, scale: float = 3.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(scale * torch.randn(rows, vocabulary, generator=generator) for _ in range(2))


def _labels(logits: Tensor) -> Tensor:
    return torch.arange(len(logits)) % logits.shape[-1]


def _direct(z: Tensor, t: Tensor, temperature: float) -> Tensor:
    """The definition, in float64 probabilities."""
    p, q = (x.double().div(temperature).softmax(-1) for x in (t, z))
    return (p * (p / q).log()).sum(-1)


def _gradient(function: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    leaf = z.clone().requires_grad_()
    return torch.autograd.grad(function(leaf).sum(), leaf)[0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_the_definition(temperature: float, dtype: torch.dtype) -> None:
    z, t = (x.to(dtype) for x in _logits())
    found = forward_kl(z, DenseTargets(t), temperature)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), _direct(z, t, temperature), rtol=1e-5, atol=1e-6)
    expected = _gradient(lambda x: _direct(x, t, temperature), z.double())
    actual = _gradient(lambda x: forward_kl(x, DenseTargets(t), temperature), z)
    rounding = 1e-4 if dtype == torch.float32 else 2**-8  # the gradient has the type of the logits
    torch.testing.assert_close(actual.double(), expected, rtol=rounding, atol=1e-6)


def test_the_gradient_is_q_minus_p_over_t() -> None:
    z, t = _logits()
    actual = _gradient(lambda x: forward_kl(x, DenseTargets(t), 2.0), z)
    torch.testing.assert_close(actual, ((z / 2).softmax(-1) - (t / 2).softmax(-1)) / 2)


# -- properties ------------------------------------------------------------------------------------------------------

rows = st.lists(st.floats(-30, 30, width=32), min_size=7, max_size=7)


@settings(max_examples=60, deadline=None)
@given(z=rows, t=rows)
def test_never_negative(z: list[float], t: list[float]) -> None:
    assert float(forward_kl(torch.tensor([z]), DenseTargets(torch.tensor([t])))) >= -1e-6


@settings(max_examples=30, deadline=None)
@given(z=rows, shift=st.floats(-5, 5))
def test_zero_for_equal_distributions(z: list[float], shift: float) -> None:
    logits = torch.tensor([z])
    assert float(forward_kl(logits, DenseTargets(logits + shift))) == pytest.approx(0, abs=1e-5)


@settings(max_examples=30, deadline=None)
@given(z=rows, at=st.integers(0, 6))
def test_above_zero_for_others(z: list[float], at: int) -> None:
    """Half of a probability moved; Pinsker's inequality."""
    p = torch.tensor([z]).softmax(-1)
    q = 0.5 * p + 0.5 * functional.one_hot(torch.tensor([at]), 7)
    distance = float((p - q).abs().sum() / 2)
    assert float(forward_kl(q.log(), DenseTargets(p.log()))) >= 2 * distance**2 - 1e-6


# -- far out ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("one_hot", [False, True])
def test_finite_at_huge_logits_and_one_hot_teachers(one_hot: bool) -> None:
    z = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0], [-1e4, 1e4, 1e4], [1e4, 1e4, 1e4]])
    t = z.flip(0).flip(1)
    if one_hot:
        t = torch.full_like(t, -torch.inf)
        t[:, 1] = 0.0
    for targets in (DenseTargets(t), TopK(k=2)(t, _labels(t)), TopK(k=3)(t, _labels(t))):
        assert forward_kl(z, targets).isfinite().all()
        assert _gradient(lambda x, fixed=targets: forward_kl(x, fixed), z).isfinite().all()


def test_a_one_hot_teacher_gives_cross_entropy() -> None:
    z, _ = _logits()
    t = torch.full_like(z, -torch.inf).scatter(1, _labels(z)[:, None], 0.0)
    expected = functional.cross_entropy(z, _labels(z), reduction="none")
    torch.testing.assert_close(forward_kl(z, DenseTargets(t)), expected)


# -- sparse teachers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_of_everything_is_dense(temperature: float) -> None:
    z, t = _logits()
    kept, dense = TopK(k=11, temperature=temperature)(t, _labels(t)), DenseTargets(t)
    values = forward_kl(z, kept, temperature), forward_kl(z, dense, temperature)
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6)
    expected = _gradient(lambda x: forward_kl(x, dense, temperature), z)
    torch.testing.assert_close(_gradient(lambda x: forward_kl(x, kept, temperature), z), expected, rtol=1e-4, atol=1e-6)


def test_the_rest_of_top_k_is_one_outcome() -> None:
    z, t = _logits()
    kept = TopK(k=4)(t, _labels(t))
    for side in kept.pair(z, 1.0):
        torch.testing.assert_close(side.exp().sum(-1), torch.ones(5))
    order = t.argsort(-1, descending=True)
    sorted_q, sorted_p = (x.softmax(-1).gather(-1, order) for x in (z, t))
    q, p = (torch.cat((x[:, :4], x[:, 4:].sum(-1, keepdim=True)), -1) for x in (sorted_q, sorted_p))
    expected = forward_kl(q.log(), DenseTargets(p.log()))
    torch.testing.assert_close(forward_kl(z, kept), expected, rtol=1e-4, atol=1e-6)
    assert (forward_kl(z, kept) <= forward_kl(z, DenseTargets(t)) + 1e-6).all()  # data processing inequality


def test_the_rest_counts_even_for_a_very_sure_student() -> None:
    """1 - sum over the kept ids would be 0 in float32, and so would be the gradient."""
    z = torch.tensor([[40.0, 0.0, 0.0, 0.0]])
    t = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    kept = TopK(k=1)(t, _labels(t))
    p = float(t.softmax(-1)[0, 0])
    expected = p * math.log(p) + (1 - p) * (math.log(1 - p) - (math.log(3) - 40))
    assert float(forward_kl(z, kept)) == pytest.approx(expected, rel=1e-5)
    assert _gradient(lambda x: forward_kl(x, kept), z)[0, 0] == pytest.approx(1 - p, rel=1e-4)


def test_knowledge_is_at_temperature_one_whatever_is_kept() -> None:
    _, t = _logits()
    labels = _labels(t)
    dense = DenseTargets(t).knowledge(labels)
    p = t.double().softmax(-1)
    torch.testing.assert_close(dense.entropy_N.double(), -(p * p.log()).sum(-1), rtol=1e-5, atol=1e-6)
    for a, b in zip(TopK(k=3, temperature=2.0)(t, labels).knowledge(labels), dense, strict=True):
        torch.testing.assert_close(a, b)


def test_logits_come_back_from_log_probabilities_and_logsumexp() -> None:
    _, t = _logits()
    kept = TopK(k=3, temperature=2.0)(t, _labels(t))
    torch.testing.assert_close(2 * (kept.logprobs_NK + kept.logsumexp_N[:, None]), t.topk(3).values)


def test_what_does_not_fit_is_refused() -> None:
    z, t = _logits()
    for targets in (DenseTargets(t), TopK(k=2)(t, _labels(t))):
        with pytest.raises(HerdError, match="11 ids, the student 9: they need the same tokenizer"):
            forward_kl(z[:, :9], targets)
    with pytest.raises(HerdError, match=r"temperature 1\.0, the loss uses 2\.0"):
        forward_kl(z, TopK(k=2)(t, _labels(t)), 2.0)
    with pytest.raises(HerdError, match="12 best ids cannot be kept of a vocabulary of 11"):
        TopK(k=12)(t, _labels(t))
    with pytest.raises(HerdError, match="must be above 0"):
        TopK(k=0)
