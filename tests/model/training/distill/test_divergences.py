"""Divergences: values and gradients against float64 formulas, their defining properties, and sparse teachers."""

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
from herdgraph.model.training.distill import (
    DIVERGENCES,
    DenseTargets,
    Divergence,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    Sample,
    SkewKL,
    TopK,
)

ALL = [ForwardKL(), ReverseKL(), JensenShannon(), JensenShannon(0.2), SkewKL(), SkewKL(0.5)]
NAMES = [repr(divergence) for divergence in ALL]
every = pytest.mark.parametrize("divergence", ALL, ids=NAMES)


def _logits(rows: int = 5, vocabulary: int = 11, scale: float = 3.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(scale * torch.randn(rows, vocabulary, generator=generator) for _ in range(2))


def _labels(logits: Tensor) -> Tensor:
    return torch.arange(len(logits)) % logits.shape[-1]


def _direct(divergence: Divergence, z: Tensor, t: Tensor, temperature: float) -> Tensor:
    """The definitions, in float64 probabilities."""
    p, q = (x.double().div(temperature).softmax(-1) for x in (t, z))

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum(-1)

    if isinstance(divergence, JensenShannon):
        beta = divergence.beta
        m = beta * p + (1 - beta) * q
        return beta * kl(p, m) + (1 - beta) * kl(q, m)
    if isinstance(divergence, SkewKL):
        return kl(p, divergence.skew * p + (1 - divergence.skew) * q)
    return kl(p, q) if isinstance(divergence, ForwardKL) else kl(q, p)


def _gradient(function: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    leaf = z.clone().requires_grad_()
    return torch.autograd.grad(function(leaf).sum(), leaf)[0]


@every
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_the_definition(
    divergence: Divergence, temperature: float, dtype: torch.dtype
) -> None:
    z, t = (x.to(dtype) for x in _logits())
    found = divergence(z, DenseTargets(t), temperature)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), _direct(divergence, z, t, temperature), rtol=1e-5, atol=1e-6)
    expected = _gradient(lambda x: _direct(divergence, x, t, temperature), z.double())
    actual = _gradient(lambda x: divergence(x, DenseTargets(t), temperature), z)
    rounding = 1e-4 if dtype == torch.float32 else 2**-8  # the gradient has the type of the logits
    torch.testing.assert_close(actual.double(), expected, rtol=rounding, atol=1e-6)


def test_forward_and_reverse_are_torchs() -> None:
    z, t = _logits()
    logq, logp = z.log_softmax(-1), t.log_softmax(-1)
    for divergence, args in ((ForwardKL(), (logq, logp)), (ReverseKL(), (logp, logq))):
        expected = functional.kl_div(*args, log_target=True, reduction="none").sum(-1)
        torch.testing.assert_close(divergence(z, DenseTargets(t)), expected)


def test_the_gradient_of_the_forward_kl_is_q_minus_p_over_t() -> None:
    z, t = _logits()
    actual = _gradient(lambda x: ForwardKL()(x, DenseTargets(t), 2.0), z)
    torch.testing.assert_close(actual, ((z / 2).softmax(-1) - (t / 2).softmax(-1)) / 2)


# -- properties ------------------------------------------------------------------------------------------------------

rows = st.lists(st.floats(-30, 30, width=32), min_size=7, max_size=7)


@every
@settings(max_examples=60, deadline=None)
@given(z=rows, t=rows)
def test_never_negative(divergence: Divergence, z: list[float], t: list[float]) -> None:
    assert float(divergence(torch.tensor([z]), DenseTargets(torch.tensor([t])))) >= -1e-6


@every
@settings(max_examples=30, deadline=None)
@given(z=rows, shift=st.floats(-5, 5))
def test_zero_for_equal_distributions(divergence: Divergence, z: list[float], shift: float) -> None:
    logits = torch.tensor([z])
    assert float(divergence(logits, DenseTargets(logits + shift))) == pytest.approx(0, abs=1e-5)


@every
@settings(max_examples=30, deadline=None)
@given(z=rows, at=st.integers(0, 6))
def test_above_zero_for_others(divergence: Divergence, z: list[float], at: int) -> None:
    """Half of a probability moved: far from equal whatever the rest is."""
    p = torch.tensor([z]).softmax(-1)
    q = 0.5 * p + 0.5 * functional.one_hot(torch.tensor([at]), 7)
    distance = float((p - q).abs().sum() / 2)
    # The mixtures move the student toward the teacher, by at most the half here.
    assert float(divergence(q.log(), DenseTargets(p.log()))) >= 0.1 * distance**2 - 1e-6


@settings(max_examples=60, deadline=None)
@given(z=rows, t=rows)
def test_jensen_shannon_is_symmetric_and_bounded(z: list[float], t: list[float]) -> None:
    a, b = torch.tensor([z]), torch.tensor([t])
    there, back = (float(JensenShannon()(x, DenseTargets(y))) for x, y in ((a, b), (b, a)))
    assert there == pytest.approx(back, abs=1e-6)
    assert there <= math.log(2) + 1e-6


def test_jensen_shannon_tends_to_both_kls() -> None:
    z, t = _logits(scale=1.0)
    for beta, limit in ((1e-4, ForwardKL()), (1 - 1e-4, ReverseKL())):
        scaled = JensenShannon(beta)(z.double(), DenseTargets(t)) / min(beta, 1 - beta)
        torch.testing.assert_close(scaled, limit(z, DenseTargets(t)), rtol=0.01, atol=0.01)


@settings(max_examples=60, deadline=None)
@given(z=rows, t=rows, skew=st.floats(0.01, 0.99))
def test_skew_is_bounded_and_below_the_forward_kl(z: list[float], t: list[float], skew: float) -> None:
    a, b = torch.tensor([z]), DenseTargets(torch.tensor([t]))
    found = float(SkewKL(skew)(a, b))
    assert found <= -math.log(skew) + 1e-5
    assert found <= (1 - skew) * float(ForwardKL()(a, b)) + 1e-5  # convexity


def test_limits_of_skew() -> None:
    z, targets = _logits()[0], DenseTargets(_logits()[1])
    torch.testing.assert_close(SkewKL(0.0)(z, targets), ForwardKL()(z, targets), rtol=0, atol=0)
    torch.testing.assert_close(SkewKL(1e-6)(z, targets), ForwardKL()(z, targets), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(SkewKL(0.9999)(z, targets), torch.zeros(5), rtol=0, atol=1e-3)


@pytest.mark.parametrize("make", [lambda: JensenShannon(0.0), lambda: JensenShannon(1.0), lambda: SkewKL(1.0)])
def test_impossible_parameters_are_refused(make: Callable[[], Divergence]) -> None:
    with pytest.raises(HerdError, match="must be"):
        make()


def test_divergences_by_name() -> None:
    assert {name: kind().name for name, kind in DIVERGENCES.items()} == {name: name for name in DIVERGENCES}


# -- far out ---------------------------------------------------------------------------------------------------------


def _extremes() -> tuple[Tensor, Tensor]:
    z = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0], [-1e4, 1e4, 1e4], [1e4, 1e4, 1e4]])
    return z, z.flip(0).flip(1)


@every
@pytest.mark.parametrize("one_hot", [False, True])
def test_finite_at_huge_logits_and_one_hot_teachers(divergence: Divergence, one_hot: bool) -> None:
    z, t = _extremes()
    if one_hot:
        t = torch.full_like(t, -torch.inf)
        t[:, 1] = 0.0
    for targets in (DenseTargets(t), TopK(k=2)(t, _labels(t)), TopK(k=3)(t, _labels(t)), Sample(k=4)(t, _labels(t))):
        assert divergence(z, targets).isfinite().all()
        assert _gradient(lambda x, fixed=targets: divergence(x, fixed), z).isfinite().all()


def test_a_one_hot_teacher_gives_cross_entropy() -> None:
    z, _ = _logits()
    t = torch.full_like(z, -torch.inf).scatter(1, _labels(z)[:, None], 0.0)
    expected = functional.cross_entropy(z, _labels(z), reduction="none")
    torch.testing.assert_close(ForwardKL()(z, DenseTargets(t)), expected)


# -- sparse teachers -------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_of_everything_is_dense(divergence: Divergence, temperature: float) -> None:
    z, t = _logits()
    kept = TopK(k=11, temperature=temperature)(t, _labels(t))
    dense = DenseTargets(t)
    values = divergence(z, kept, temperature), divergence(z, dense, temperature)
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6)
    expected = _gradient(lambda x: divergence(x, dense, temperature), z)
    torch.testing.assert_close(_gradient(lambda x: divergence(x, kept, temperature), z), expected, rtol=1e-4, atol=1e-6)


@every
def test_the_rest_of_top_k_is_one_outcome(divergence: Divergence) -> None:
    z, t = _logits()
    kept = TopK(k=4)(t, _labels(t))
    logp, logq, _ = kept.pair(z, 1.0)
    for side in (logp, logq):
        torch.testing.assert_close(side.exp().sum(-1), torch.ones(5))
    order = t.argsort(-1, descending=True)
    sorted_q, sorted_p = (x.softmax(-1).gather(-1, order) for x in (z, t))
    q, p = (torch.cat((x[:, :4], x[:, 4:].sum(-1, keepdim=True)), -1) for x in (sorted_q, sorted_p))
    expected = divergence(q.log(), DenseTargets(p.log()))
    torch.testing.assert_close(divergence(z, kept), expected, rtol=1e-4, atol=1e-6)
    assert (divergence(z, kept) <= divergence(z, DenseTargets(t)) + 1e-6).all()  # data processing inequality


def test_the_rest_counts_even_for_a_very_sure_student() -> None:
    """1 - sum over the kept ids would be 0 in float32, and so would be the gradient."""
    z = torch.tensor([[40.0, 0.0, 0.0, 0.0]])
    t = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    kept = TopK(k=1)(t, _labels(t))
    p = float(t.softmax(-1)[0, 0])
    expected = p * math.log(p) + (1 - p) * (math.log(1 - p) - (math.log(3) - 40))
    assert float(ForwardKL()(z, kept)) == pytest.approx(expected, rel=1e-5)
    assert _gradient(lambda x: ForwardKL()(x, kept), z)[0, 0] == pytest.approx(1 - p, rel=1e-4)


@pytest.mark.parametrize("power", [1.0, 0.7])
@every
def test_estimates_from_draws_are_unbiased(divergence: Divergence, power: float) -> None:
    """Value and gradient over many draws, within four standard errors of the exact ones."""
    z, t = _logits(rows=1, vocabulary=8, scale=1.5)
    draws, generator = 4000, torch.Generator().manual_seed(1)
    many_z, many_t = z.expand(draws, -1), t.expand(draws, -1)
    kept = Sample(k=12, power=power, generator=generator)(many_t, torch.zeros(draws, dtype=torch.int64))
    for found, expected in (
        (divergence(many_z, kept)[:, None], divergence(z, DenseTargets(t))[:, None]),
        (_gradient(lambda x: divergence(x, kept), many_z), _gradient(lambda x: divergence(x, DenseTargets(t)), z)),
    ):
        error = (found.mean(0) - expected[0]).abs()
        assert (error <= 4 * found.std(0) / draws**0.5 + 1e-6).all()


def test_draws_from_the_teacher_itself_weigh_the_same() -> None:
    z, t = _logits()
    kept = Sample(k=6)(t, _labels(t))
    logp, logq, _ = kept.pair(z, 1.0)
    torch.testing.assert_close(ForwardKL()(z, kept), (logp - logq).mean(-1))


def test_knowledge_is_at_temperature_one_whatever_is_kept() -> None:
    _, t = _logits()
    labels = _labels(t)
    dense = DenseTargets(t).knowledge(labels)
    p = t.double().softmax(-1)
    torch.testing.assert_close(dense.entropy_N.double(), -(p * p.log()).sum(-1), rtol=1e-5, atol=1e-6)
    for keep in (TopK(k=3, temperature=2.0), Sample(k=3, temperature=2.0)):
        kept = keep(t, labels).knowledge(labels)
        for a, b in zip(kept, dense, strict=True):
            torch.testing.assert_close(a, b)


def test_logits_come_back_from_log_probabilities_and_logsumexp() -> None:
    _, t = _logits()
    kept = TopK(k=3, temperature=2.0)(t, _labels(t))
    torch.testing.assert_close(2 * (kept.logprobs_NK + kept.logsumexp_N[:, None]), t.topk(3).values)


def test_what_does_not_fit_is_refused() -> None:
    z, t = _logits()
    for targets in (DenseTargets(t), TopK(k=2)(t, _labels(t)), Sample(k=2)(t, _labels(t))):
        with pytest.raises(HerdError, match="11 ids, the student 9: they need the same tokenizer"):
            ForwardKL()(z[:, :9], targets)
    for keep in (TopK(k=2), Sample(k=2)):
        with pytest.raises(HerdError, match=r"temperature 1\.0, the loss uses 2\.0"):
            ForwardKL()(z, keep(t, _labels(t)), 2.0)
    with pytest.raises(HerdError, match="12 best ids cannot be kept of a vocabulary of 11"):
        TopK(k=12)(t, _labels(t))
    with pytest.raises(HerdError, match="must be above 0"):
        TopK(k=0)
