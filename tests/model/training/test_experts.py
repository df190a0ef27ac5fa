"""Mixtures of experts in training: gradients, balance, losses, and one step beside transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from herdgraph.errors import HerdError
from herdgraph.model.checkpoint import open_checkpoint, save_checkpoint
from herdgraph.model.config import TextConfig
from herdgraph.model.config.names import expected_tensors
from herdgraph.model.config.presets import TINY
from herdgraph.model.llama4.decoder import MixtureOfExperts
from herdgraph.model.llama4.model import Llama4
from herdgraph.model.llama4.operators import routed_experts
from herdgraph.model.training.moe.balancing import bias_schedule, load_balancing_loss, router_z_loss
from herdgraph.model.training.moe.experts import (
    BalancedMixture,
    ExpertOptions,
    GroupedExperts,
    auxiliary_loss,
    fade_selection_biases,
    plain_state_dict,
    prepare_for_training,
    update_selection_biases,
)
from herdgraph.model.training.moe.grouped import (
    fits_kernel,
    grouped_gradient,
    grouped_product,
    offsets_of,
    product_by_loop,
)
from support import herds
from support.twins import gradients, twins


def text(experts: int, top_k: int, width: int = 6, inner: int = 4) -> TextConfig:
    return herds.variant(num_experts=experts, top_k=top_k, hidden_size=width, expert_size=inner).text


def straightforward(mixture: MixtureOfExperts, x_TD: torch.Tensor, top_k: int) -> torch.Tensor:
    """Token by token, expert by expert."""
    rows = []
    for x in x_TD:
        shared, experts = mixture.shared_expert, mixture.experts
        y = shared.down_proj.weight @ (functional.silu(shared.gate_proj.weight @ x) * (shared.up_proj.weight @ x))
        logits = mixture.router.weight @ x
        for expert in logits.topk(top_k).indices:
            scaled = x / (1 + torch.exp(-logits[expert]))
            gate, up = (scaled @ experts.gate_up_proj[expert]).chunk(2)
            y = y + (gate / (1 + torch.exp(-gate)) * up) @ experts.down_proj[expert]
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize(("experts", "top_k", "tokens"), [(5, 1, 9), (5, 2, 9), (3, 3, 4), (1, 1, 3), (16, 1, 1)])
def test_gradients_equal_a_straightforward_loop_in_float64(experts: int, top_k: int, tokens: int) -> None:
    mixture = BalancedMixture(text(experts, top_k), ExpertOptions()).double()
    x_TD = torch.randn(tokens, 6, dtype=torch.float64, requires_grad=True)
    dy_TD = torch.randn(tokens, 6, dtype=torch.float64)
    inputs = [x_TD, *mixture.parameters()]
    expected_TD = straightforward(mixture, x_TD, top_k)
    found_TD = mixture(x_TD[None])[0]
    torch.testing.assert_close(found_TD, expected_TD, rtol=1e-12, atol=1e-13)
    for found, expected in zip(torch.autograd.grad(found_TD, inputs, dy_TD),
                               torch.autograd.grad(expected_TD, inputs, dy_TD), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert mixture.router.weight.shape == (experts, 6)


@settings(max_examples=60, deadline=None)
@given(experts=st.integers(1, 9), top_k=st.integers(1, 9), tokens=st.integers(1, 20), favoured=st.integers(0, 9),
       dtype=st.sampled_from([torch.float32, torch.float64]), seed=st.integers(0, 99))
def test_any_routing_is_the_operator(
    experts: int, top_k: int, tokens: int, favoured: int, dtype: torch.dtype, seed: int
) -> None:
    """float32 through ``grouped_mm``, float64 through the loop; one favoured expert leaves others empty."""
    torch.manual_seed(seed)
    top_k = min(top_k, experts)
    grouped = GroupedExperts(text(experts, top_k, 16, 8)).to(dtype)
    x_TD = torch.randn(tokens, 16, dtype=dtype, requires_grad=True)
    logits_TE = torch.randn(tokens, experts, dtype=dtype)
    logits_TE[:, favoured % experts] += 20 * (favoured % 2)
    logits_TE.requires_grad_()
    inputs = [x_TD, logits_TE, grouped.gate_up_proj, grouped.down_proj]
    dy_TD = torch.randn(tokens, 16, dtype=dtype)
    found_TD = grouped(x_TD, logits_TE)
    expected_TD = routed_experts(x_TD, logits_TE, grouped.gate_up_proj, grouped.down_proj, top_k=top_k)
    torch.testing.assert_close(found_TD, expected_TD, rtol=1e-4, atol=1e-5)
    for found, expected in zip(torch.autograd.grad(found_TD, inputs, dy_TD),
                               torch.autograd.grad(expected_TD, inputs, dy_TD), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[3, 0, 5], [0, 0, 8], [8, 0, 0], [0, 0, 0]])
def test_kernel_and_loop_are_one_function(counts: list[int], dtype: torch.dtype) -> None:
    offsets_E = offsets_of(torch.tensor(counts))
    x_RK = torch.randn(sum(counts), 16, dtype=dtype, requires_grad=True)
    weight_EKN = torch.randn(3, 16, 24, dtype=dtype, requires_grad=True)
    assert fits_kernel(x_RK, weight_EKN)
    y_RN, loop_RN = (f(x_RK, weight_EKN, offsets_E) for f in (grouped_product, product_by_loop))
    torch.testing.assert_close(y_RN, loop_RN)
    dy_RN = torch.randn_like(y_RN)
    for found, expected in zip(torch.autograd.grad(y_RN, (x_RK, weight_EKN), dy_RN),
                               torch.autograd.grad(loop_RN, (x_RK, weight_EKN), dy_RN), strict=True):
        torch.testing.assert_close(found, expected)
    if sum(counts):
        by_hand = torch.autograd.grad(grouped_product(x_RK, weight_EKN, offsets_E), weight_EKN, dy_RN)[0]
        torch.testing.assert_close(grouped_gradient(x_RK.detach(), dy_RN, offsets_E), by_hand)


def test_what_the_kernel_refuses_goes_through_the_loop() -> None:
    offsets_E = offsets_of(torch.tensor([2, 3]))
    for dtype, inputs, outputs in ((torch.float64, 16, 16), (torch.float32, 16, 6), (torch.bfloat16, 12, 16)):
        x_RK, weight_EKN = torch.randn(5, inputs, dtype=dtype), torch.randn(2, inputs, outputs, dtype=dtype)
        with pytest.raises(RuntimeError):
            functional.grouped_mm(x_RK, weight_EKN, offs=offsets_E)
        expected = torch.cat((x_RK[:2] @ weight_EKN[0], x_RK[2:] @ weight_EKN[1]))
        torch.testing.assert_close(grouped_product(x_RK, weight_EKN, offsets_E), expected)


def test_autocast_reaches_experts_but_not_the_router() -> None:
    mixture = BalancedMixture(text(4, 1, 16, 8), ExpertOptions())
    x_BTD = torch.randn(2, 5, 16)
    seen: list[torch.Tensor] = []
    mixture.experts.gate_up_product.register_forward_hook(lambda _m, _i, y: seen.append(y))
    with torch.autocast("cpu", torch.bfloat16):
        logits_TE = mixture.route(x_BTD.flatten(0, 1))
        mixture(x_BTD).sum().backward()
    assert logits_TE.dtype == torch.float32
    assert torch.equal(logits_TE, mixture.router(x_BTD.flatten(0, 1)))
    assert seen[0].dtype == torch.bfloat16
    assert {parameter.grad.dtype for parameter in mixture.parameters() if parameter.grad is not None} == {torch.float32}


def test_the_bias_chooses_but_never_scores() -> None:
    mixture = BalancedMixture(text(4, 1), ExpertOptions())
    x_TD = torch.randn(7, 6)
    plain_TD = mixture(x_TD[None])[0]
    mixture.selection_bias[2] = 100.0
    biased_TD = mixture(x_TD[None])[0]
    scores_T1 = torch.sigmoid(mixture.router(x_TD)[:, 2:3])
    gate, up = (scores_T1 * x_TD @ mixture.experts.gate_up_proj[2]).chunk(2, dim=-1)
    routed = functional.silu(gate) * up @ mixture.experts.down_proj[2]
    torch.testing.assert_close(biased_TD, mixture.shared_expert(x_TD) + routed)
    own = int((mixture.router(x_TD).argmax(1) == 2).sum())
    assert int(mixture.moved) == 7 - own > 0
    assert mixture.counts[2] == 7 + own
    torch.testing.assert_close(mixture.eval()(x_TD[None])[0], plain_TD)  # what is served knows no bias


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_bias_evens_out_a_skewed_router(top_k: int) -> None:
    mixture = BalancedMixture(text(8, top_k, 16, 8), ExpertOptions(bias_rate=0.05))
    model = torch.nn.ModuleDict({"feed_forward": mixture})
    x_BTD = torch.randn(1, 400, 16) + 0.5
    before = mixture.router.weight.clone()

    def imbalance() -> float:
        mixture(x_BTD)
        counts_E, moved = update_selection_biases(model)["feed_forward"]
        assert 0 <= moved <= 1
        assert not mixture.counts.any()
        assert not mixture.moved
        assert int(counts_E.sum()) == 400 * top_k
        return float(counts_E.max() / counts_E.float().mean())

    first = imbalance()
    for _ in range(60):
        last = imbalance()
    assert first > 1.7
    assert last < 1.15
    assert torch.equal(mixture.router.weight, before)
    assert not mixture.selection_bias.requires_grad
    assert abs(float(mixture.selection_bias.mean())) < 1e-5


def test_ranks_update_by_the_sum_of_their_counts() -> None:
    model = prepare_for_training(Llama4(herds.variant()), ExpertOptions(bias_rate=0.5)).train()
    model(torch.tensor([herds.tokens(20)]))
    others = torch.tensor([[0, 0, 0, 1000, 255], [1000, 1000, 0, 1000, 0]])
    loads = update_selection_biases(model, lambda seen_LN: seen_LN + others)
    assert [load.counts_E.sum() for load in loads.values()] == [1020, 3020]
    assert [load.moved for load in loads.values()] == [0.25, 0]
    first, last = (layer.feed_forward.selection_bias for layer in model.decoder.layers[1::2])
    torch.testing.assert_close(first, 0.5 * (torch.tensor([1.0, 1, 1, -1]) - 0.5))
    torch.testing.assert_close(last, 0.5 * (torch.tensor([-1.0, -1, 1, -1]) + 0.5))


def test_the_bias_fades_until_what_is_trained_is_what_is_served() -> None:
    mixture = BalancedMixture(text(4, 1), ExpertOptions(bias_fade=0.5))
    mixture.selection_bias[2] = 4.0
    logits_TE = torch.tensor([[3.0, 0, 0, 0], [1.0, 0, 0, 0]])
    chosen = {}
    for step in range(10):
        fade_selection_biases(mixture, step, 10)
        chosen[step] = mixture.choose(logits_TE).flatten().tolist()
    assert chosen == {0: [2, 2], 1: [2, 2], 2: [2, 2], 3: [2, 2], 4: [2, 2], 5: [2, 2], 6: [0, 2], 7: [0, 2],
                      8: [0, 0], 9: [0, 0]}
    shares = [bias_schedule(step, 10, 0.5) for step in range(10)]
    assert shares == pytest.approx([1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0])
    assert [bias_schedule(step, 10, 0) for step in range(10)] == [1] * 10
    assert bias_schedule(0, 1, 0.2) == 0
    with pytest.raises(HerdError, match=r"bias_fade is 1\.5, it must be within 0 and 1"):
        ExpertOptions(bias_fade=1.5)


def test_counts_add_up_until_they_are_reset_and_recomputing_counts_once() -> None:
    mixture = BalancedMixture(text(4, 2), ExpertOptions(balance_loss=0.1, z_loss=0.01))
    model = torch.nn.ModuleDict({"feed_forward": mixture})
    x_BTD = torch.randn(1, 9, 6, requires_grad=True)

    def step(run: object) -> tuple[torch.Tensor, ...]:
        loss = run(x_BTD).square().sum() + auxiliary_loss(model)
        return torch.autograd.grad(loss, [x_BTD, *mixture.parameters()])

    plain = step(mixture)
    recomputed = step(lambda x: checkpoint(mixture, x, use_reentrant=False))
    for found, expected in zip(recomputed, plain, strict=True):
        torch.testing.assert_close(found, expected)
    assert int(mixture.counts.sum()) == 2 * 9 * 2
    assert auxiliary_loss(model) is None
    mixture.eval()(x_BTD)
    assert int(mixture.counts.sum()) == 2 * 9 * 2, "judging is not training"


def test_auxiliary_losses_by_their_definition() -> None:
    logits_TE = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    experts_Tk = logits_TE.topk(2).indices
    scores = 1 / (1 + torch.exp(-logits_TE))
    share_E = (scores / scores.sum(1, keepdim=True)).mean(0)
    load_E = torch.tensor([(experts_Tk == e).sum() / 12 for e in range(3)])
    torch.testing.assert_close(load_balancing_loss(logits_TE, experts_Tk), 3 * (share_E * load_E).sum())
    torch.testing.assert_close(router_z_loss(logits_TE), torch.log(torch.exp(logits_TE).sum(1)).pow(2).mean())
    even = torch.zeros(4, 4), torch.arange(4)[:, None]
    assert float(load_balancing_loss(*even)) == 1
    # The gradient takes from the expert with more than its share.
    one_has_it_all = load_balancing_loss(logits_TE, torch.zeros(6, 1, dtype=torch.int64))
    assert (torch.autograd.grad(one_has_it_all, logits_TE)[0][:, 0] > 0).all()


def test_auxiliary_losses_are_off_unless_asked_for() -> None:
    ids_BT = torch.tensor([herds.tokens(20)])
    for options, expected in ((None, 0), (ExpertOptions(balance_loss=1.0), 2)):
        model = prepare_for_training(Llama4(herds.variant()), options).train()
        model(ids_BT)
        loss = auxiliary_loss(model)
        assert (loss is None) == (not expected)
        if loss is not None:
            assert expected * 0.9 < float(loss.detach()) < expected * 2.5, "one for each of two mixtures, when even"
            loss.backward()
            assert model.decoder.layers[1].feed_forward.router.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["moe-every-layer", "tied", "images"])
def test_preparing_keeps_parameters_and_checkpoints(name: str, tmp_path: Path) -> None:
    config = TINY if name == "images" else herds.VARIANTS[name]
    model = Llama4(config)
    before = dict(model.named_parameters())
    assert prepare_for_training(model) is model
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    assert sum(isinstance(part, BalancedMixture) for part in model.modules()) == len(config.text.moe_layers)
    assert any("selection_bias" in name for name in model.state_dict()), "a resumed run needs it"
    plain = plain_state_dict(model)
    assert {name: tuple(tensor.shape) for name, tensor in plain.items()} == expected_tensors(config)
    save_checkpoint(tmp_path / "saved", config, plain.items())
    with open_checkpoint(tmp_path / "saved") as saved:
        again = Llama4.from_checkpoint(saved)
    ids_BT = torch.tensor([herds.tokens(20)])
    torch.testing.assert_close(again(ids_BT), model.eval()(ids_BT))


STEPS = ["moe-every-second-layer", "moe-every-layer", "dense", "no-qk-norm", "nope-every-2nd", "temperature-floor-3",
         "chunk-5", "gqa-4", "1-expert", "7-experts", "16-experts", "top-2", "tied", "images"]


@pytest.mark.parametrize("name", STEPS)
def test_one_step_equals_transformers(name: str) -> None:
    """Logits, loss and every gradient; transformers computes all experts on all tokens, ours only the chosen ones."""
    config = TINY if name == "images" else herds.VARIANTS[name]
    ours, theirs = twins(config)
    prepare_for_training(ours).train()
    rows = [herds.tokens(40, seed=row) for row in range(2)]
    images = {}
    if name == "images":
        rows = [row[:9] + [TINY.begin_image_token_id, *[TINY.image_token_id] * 4] * (1 + i) + row[9:33 - 5 * i]
                for i, row in enumerate(rows)]
        images = {"pixel_values": torch.randn(3, 3, 28, 28)}
    ids_BT = torch.tensor(rows)

    expected = theirs.train()(ids_BT, labels=ids_BT, use_cache=False, **images)
    expected.loss.backward()
    logits_BTV = ours(ids_BT, images.get("pixel_values"))
    loss = functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
    loss.backward()

    torch.testing.assert_close(logits_BTV, expected.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(loss, expected.loss, atol=1e-5, rtol=1e-6)
    found, wanted = gradients(ours), gradients(theirs)
    assert found.keys() == wanted.keys() == expected_tensors(config).keys()
    for tensor, gradient in wanted.items():
        bound = 2e-5 * float(gradient.abs().max()) + 1e-8
        torch.testing.assert_close(found[tensor], gradient, atol=bound, rtol=0, msg=lambda m, t=tensor: f"{t}: {m}")
        assert gradient.abs().max() > 0, tensor


def test_an_unprepared_model_runs_under_autocast() -> None:
    torch.manual_seed(0)
    model = Llama4(TINY).eval()
    ids_BT = torch.randint(3, 400, (2, 12))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rounded = model(ids_BT)
    assert float((rounded.float() - model(ids_BT)).detach().std()) < 0.1 * float(rounded.float().std())
