"""The loss: its limits, its gradients against a direct float64 formula, masks, chunks, and what it reports."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from herdgraph.errors import HerdError
from herdgraph.model.training.distill import (
    DistillationLoss,
    Fixed,
    Projection,
    Responsibility,
    TopK,
    Weighting,
    chunks,
)
from herdgraph.model.training.distill import loss as loss_module
from herdgraph.model.training.distill.weightings import Signals

B, T, V, D = 2, 6, 13, 5


def _case(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Student logits, teacher logits, labels with some ignored."""
    generator = torch.Generator().manual_seed(seed)
    z, t = (2 * torch.randn(B, T, V, generator=generator) for _ in range(2))
    labels = torch.randint(0, V, (B, T), generator=generator)
    labels[0, :2] = labels[1, -1] = -100
    return z.to(dtype).requires_grad_(), t, labels


def _direct(z: Tensor, t: Tensor, labels: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """The definition with the forward KL, float64, weights given."""
    keep = (labels != -100).flatten()
    z, t, labels = z.double().flatten(0, 1)[keep], t.double().flatten(0, 1)[keep], labels.flatten()[keep]
    p, q = (t / temperature).softmax(-1), (z / temperature).softmax(-1)
    kl = (p * (p / q).log()).sum(-1)
    return (weight * temperature**2 * kl + (1 - weight) * functional.cross_entropy(z, labels, reduction="none")).mean()


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "_ELEMENTS", 4 * V)  # 9 labelled tokens in three chunks
    monkeypatch.setattr(loss_module, "_HEAD_ROWS", 5)


# -- limits and gradients --------------------------------------------------------------------------------------------


def test_weight_zero_is_cross_entropy() -> None:
    z, t, labels = _case()
    loss, parts = DistillationLoss(weighting=Fixed(0.0))(z, t, labels)
    expected = functional.cross_entropy(z.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, z)[0], torch.autograd.grad(expected, z)[0])
    assert parts["hard"] == pytest.approx(expected.item())


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_weight_one_is_t_squared_times_the_divergence(temperature: float) -> None:
    z, t, labels = _case()
    loss, parts = DistillationLoss(weighting=Fixed(1.0), temperature=temperature)(z, t, labels)
    keep = labels != -100
    logq, logp = (x[keep].div(temperature).log_softmax(-1) for x in (z, t))
    expected = temperature**2 * functional.kl_div(logq, logp, log_target=True, reduction="batchmean")
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, z)[0], torch.autograd.grad(expected, z)[0])
    assert parts["soft"] == pytest.approx(expected.item())


@pytest.mark.parametrize("weighting", [Fixed(0.3), Responsibility(0.7)], ids=repr)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradients_hold_the_weights_constant(weighting: Weighting, temperature: float) -> None:
    z, t, labels = _case()
    seen: list[Tensor] = []

    class Spy(Weighting):
        def __call__(self, signals: Signals) -> Tensor:
            assert not any(value.requires_grad for value in signals if isinstance(value, Tensor))
            seen.append(weighting(signals))
            return seen[-1]

    loss, _ = DistillationLoss(weighting=Spy(), temperature=temperature)(z, t, labels)
    expected = _direct(z, t, labels, seen[0].double(), temperature)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    actual, exact = (torch.autograd.grad(value, z)[0] for value in (loss, expected))
    torch.testing.assert_close(actual, exact, rtol=1e-4, atol=1e-6)
    assert not actual[labels == -100].any()


def test_weights_with_a_gradient_are_detached() -> None:
    z, t, labels = _case()

    class Learned(Weighting):
        parameter = torch.tensor(0.5, requires_grad=True)

        def __call__(self, signals: Signals) -> Tensor:
            return self.parameter.expand_as(signals.student_label_N)

    weighting = Learned()
    loss, _ = DistillationLoss(weighting=weighting)(z, t, labels)
    loss.backward()
    assert weighting.parameter.grad is None


def test_the_teacher_gets_no_gradient() -> None:
    z, t, labels = _case()
    t.requires_grad_()
    DistillationLoss()(z, t, labels)[0].backward()
    assert t.grad is None


# -- forms of student and teacher ------------------------------------------------------------------------------------


@pytest.mark.parametrize("elements", [V, 4 * V, 1 << 20])
def test_chunks_change_nothing(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    z, t, labels = _case()
    expected, parts = DistillationLoss(temperature=2.0)(z, t, labels)
    gradient = torch.autograd.grad(expected, z)[0]
    monkeypatch.setattr(chunks, "_ELEMENTS", elements)
    found, same = DistillationLoss(temperature=2.0)(z, t, labels)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, z)[0], gradient)
    assert same == pytest.approx(parts)


@pytest.mark.parametrize("frozen", [False, True])
def test_hidden_states_and_a_head_give_the_same_as_logits(frozen: bool) -> None:
    _, t, labels = _case()
    hidden, head = torch.randn(B, T, D, requires_grad=True), torch.randn(V, D, requires_grad=not frozen)
    inputs = [hidden] if frozen else [hidden, head]
    expected, parts = DistillationLoss()(functional.linear(hidden, head), t, labels)
    found, same = DistillationLoss()(Projection(hidden, head), t, labels)
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(a, b)
    assert same == pytest.approx(parts)


def test_autocast_of_the_forward_pass_holds_in_the_backward_pass() -> None:
    _, t, labels = _case()
    hidden, head = torch.randn(B, T, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = DistillationLoss()(Projection(hidden, head), t, labels)
        expected, _ = DistillationLoss()(functional.linear(hidden, head), t, labels)
    torch.testing.assert_close(found, expected)
    assert found.dtype == torch.float32
    torch.testing.assert_close(*(torch.autograd.grad(x, hidden)[0] for x in (found, expected)), rtol=2e-2, atol=2e-3)


def test_bfloat16_logits_give_bfloat16_gradients_of_a_float32_loss() -> None:
    z, t, labels = _case(dtype=torch.bfloat16)
    loss, _ = DistillationLoss(Fixed(0.5), 2.0)(z, t.bfloat16(), labels)
    gradient = torch.autograd.grad(loss, z)[0]
    assert (loss.dtype, gradient.dtype) == (torch.float32, torch.bfloat16)
    exact = _direct(z, t.bfloat16(), labels, torch.tensor(0.5).double(), 2.0)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)


def test_a_sparse_teacher_of_everything_gives_the_same() -> None:
    z, t, labels = _case()
    kept = TopK(k=V, temperature=2.0)(t.flatten(0, 1), labels.flatten().clamp(min=0))
    expected, parts = DistillationLoss(temperature=2.0)(z, t, labels)
    found, same = DistillationLoss(temperature=2.0)(z, kept, labels)
    torch.testing.assert_close(found, expected)
    assert same == pytest.approx(parts, abs=1e-5)


# -- what counts, and what is reported -------------------------------------------------------------------------------


def test_a_mask_leaves_out_what_labels_do_not() -> None:
    z, t, labels = _case()
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1, :3] = False
    expected = DistillationLoss()(z, t, labels.masked_fill(~mask, -100))
    for same in (mask, mask.float()):
        found = DistillationLoss()(z, t, labels, same)
        torch.testing.assert_close(found[0], expected[0])
        assert found[1] == pytest.approx(expected[1])


def test_sum_is_mean_times_labelled_tokens() -> None:
    z, t, labels = _case()
    mean, _ = DistillationLoss()(z, t, labels)
    total, _ = DistillationLoss()(z, t, labels, reduction="sum")
    torch.testing.assert_close(total, mean * int((labels != -100).sum()))


def test_nothing_to_learn_is_zero_with_a_zero_gradient() -> None:
    z, t, labels = _case()
    loss, parts = DistillationLoss()(z, t, torch.full_like(labels, -100))
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, z)[0].any()
    assert set(parts.values()) == {0.0}


def test_another_ignored_label() -> None:
    z, t, labels = _case()
    expected, _ = DistillationLoss()(z, t, labels)
    found, _ = DistillationLoss(ignored=-1)(z, t, labels.masked_fill(labels == -100, -1))
    torch.testing.assert_close(found, expected)


def test_parts_are_means_over_labelled_tokens() -> None:
    z, t, labels = _case()
    loss, parts = DistillationLoss(weighting=Fixed(0.25), temperature=2.0)(z, t, labels)
    keep = labels != -100
    p = t[keep].softmax(-1)
    assert list(parts) == ["soft", "hard", "soft_weight", "teacher_entropy", "agreement"]
    assert loss.item() == pytest.approx(0.25 * parts["soft"] + 0.75 * parts["hard"], rel=1e-5)
    assert parts["soft_weight"] == 0.25
    assert parts["teacher_entropy"] == pytest.approx(float(-(p * p.log()).sum(-1).mean()), rel=1e-5)
    assert parts["agreement"] == pytest.approx(float((z[keep].argmax(-1) == t[keep].argmax(-1)).float().mean()))


def test_a_student_learns_its_teacher() -> None:
    torch.manual_seed(0)
    z, t, labels = _case()
    loss, optimizer = DistillationLoss(weighting=Fixed(1.0), temperature=2.0), torch.optim.Adam([z], 0.1)
    for _ in range(300):
        value, parts = loss(z, t, labels)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert float(value.detach()) < 1e-3
    assert parts["agreement"] == 1


def test_finite_at_huge_logits_and_one_hot_teachers() -> None:
    z, t, labels = _case()
    huge = (1e4 * z.detach().sign()).requires_grad_()
    hot = torch.full_like(t, -torch.inf).scatter(-1, labels.clamp(min=0)[..., None], 0.0)
    for teacher in (hot, 1e4 * t.sign()):
        loss, parts = DistillationLoss()(huge, teacher, labels)
        assert torch.autograd.grad(loss, huge)[0].isfinite().all()
        assert all(map(math.isfinite, parts.values()))


def test_what_does_not_fit_is_refused() -> None:
    z, t, labels = _case()
    with pytest.raises(HerdError, match="13 ids, the student 12"):
        DistillationLoss()(z[..., :12], t, labels.clamp(max=11))
    with pytest.raises(HerdError, match="targets of 6 tokens, the batch has 12"):
        DistillationLoss()(z, t[:1], labels)
    with pytest.raises(HerdError, match="temperature is 0"):
        DistillationLoss(temperature=0)
