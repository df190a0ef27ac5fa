"""FP8 training: products against fake quantisation written here, the switch, and what histories become."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import CheckpointError, checkpoint

from herdgraph.errors import HerdError
from herdgraph.model.checkpoint import open_checkpoint, save_checkpoint
from herdgraph.model.config.names import expected_tensors
from herdgraph.model.config.presets import TINY
from herdgraph.model.llama4.model import Llama4
from herdgraph.model.quantization.calibration_file import CalibrationFile
from herdgraph.model.quantization.formats import Fp8Format
from herdgraph.model.quantization.recipes import RECIPES
from herdgraph.model.training.fp8 import grouped, linear
from herdgraph.model.training.fp8.amax_history import AmaxHistory, save_amaxes, trained_amaxes
from herdgraph.model.training.fp8.grouped import fp8_grouped_product, power_of_two, rounded
from herdgraph.model.training.fp8.linear import (
    EXACT,
    Fp8Linear,
    Fp8Options,
    fp8_autocast,
    prepare_for_fp8,
    recompute_contexts,
)
from herdgraph.model.training.moe.experts import plain_state_dict, prepare_for_training
from support import herds
from support.twins import twins

RECIPES_OF_TRAINING = [Fp8Options("tensorwise"), Fp8Options("rowwise"), Fp8Options("rowwise_with_gw_hp")]
FORMATS = {"e4m3": (3, -6, 448.0), "e5m2": (2, -14, 57344.0)}


def by_recipe(recipe: Fp8Options) -> str:
    return recipe.name


def on_grid(x: Tensor, kind: str) -> Tensor:
    """The nearest number of a format, ties to even, saturating; from its definition, in float64."""
    mantissa_bits, smallest_exponent, largest = FORMATS[kind]
    exponent = torch.floor(torch.log2(x.abs().clamp(min=1e-300))).clamp(min=smallest_exponent)
    step = 2.0 ** (exponent - mantissa_bits)
    return (torch.round(x / step) * step).clamp(-largest, largest)


def fake(x: Tensor, axes: tuple[int, ...], kind: str) -> Tensor:
    """Rounded and scaled back, one power-of-two scale per slice along ``axes``."""
    x = x.double()
    if not x.numel():
        return x
    amax = x.abs().amax(axes, keepdim=True).clamp(min=1e-20)
    scale = 2.0 ** torch.ceil(torch.log2(amax / FORMATS[kind][2]))
    return on_grid(x / scale, kind) * scale


def fake_step(
    x_RK: Tensor, weight_EKN: Tensor, dy_RN: Tensor, counts: list[int], recipe: Fp8Options, *, magnitude: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx and dw of experts, each product from operands rounded along the axis it sums over.

    With ``magnitude``, sums of absolute values instead: what errors of summation are relative to.
    """
    row, column = (((1,), (0,)) if recipe.name != "tensorwise" else ((0, 1), (0, 1)))

    def product(left: Tensor, right: Tensor) -> Tensor:
        return left.abs() @ right.abs() if magnitude else left @ right

    ys, dxs, dws = [], [], []
    for x, w, dy in zip(x_RK.split(counts), weight_EKN, dy_RN.split(counts), strict=True):
        ys.append(product(fake(x, row, "e4m3"), fake(w, column, "e4m3")))
        dxs.append(product(fake(dy, row, "e5m2"), fake(w, row, "e4m3").T))
        if recipe.name == "rowwise_with_gw_hp":
            dws.append(product(x.double().T, dy.double()))
        else:
            dws.append(product(fake(x, column, "e4m3").T, fake(dy, column, "e5m2")))
    return torch.cat(ys), torch.cat(dxs), torch.stack(dws)


def assert_near(found: Tensor, expected: Tensor, relative: float) -> None:
    torch.testing.assert_close(found.double(), expected, atol=relative * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[5, 0, 16, 3], [0, 0, 1, 0], [24, 0, 0, 0]], ids=str)
@pytest.mark.parametrize("recipe", RECIPES_OF_TRAINING, ids=by_recipe)
def test_experts_forward_and_backward_are_fake_quantisation(
    recipe: Fp8Options, counts: list[int], dtype: torch.dtype
) -> None:
    """Magnitudes that differ along every axis by more than the formats can hold, so that each scale shows."""
    rows = sum(counts)
    x_RK = torch.randn(rows, 16) * torch.logspace(-3, 3, rows)[:, None] * torch.logspace(-3, 3, 16)
    weight_EKN = torch.randn(4, 16, 32) * torch.logspace(-3, 3, 32) * torch.logspace(3, -3, 16)[:, None]
    dy_RN = torch.randn(rows, 32) * torch.logspace(-12, 0, rows)[:, None] * torch.logspace(0, -12, 32)
    x_RK, weight_EKN, dy_RN = x_RK.to(dtype).requires_grad_(), weight_EKN.to(dtype).requires_grad_(), dy_RN.to(dtype)
    offsets_E = torch.tensor(counts).cumsum(0).int()
    y_RN = fp8_grouped_product(x_RK, weight_EKN, offsets_E, recipe)
    dx, dw = torch.autograd.grad(y_RN, (x_RK, weight_EKN), dy_RN)
    assert (y_RN.dtype, dx.dtype, dw.dtype) == (dtype,) * 3
    exact = 1e-6 if dtype == torch.float32 else 2.0**-8
    step = x_RK.detach(), weight_EKN.detach(), dy_RN, counts, recipe
    for found, expected, magnitude in zip((y_RN, dx, dw), fake_step(*step), fake_step(*step, magnitude=True),
                                          strict=True):
        assert ((found.double() - expected).abs() <= exact * magnitude + 1e-37).all()
    assert not dw[1].any()


def test_rounding_saturates_and_keeps_zeros_and_what_is_not_finite() -> None:
    x = torch.randn(64, 16) * torch.logspace(-4, 3, 16)
    for dtype, kind in ((torch.float8_e4m3fn, "e4m3"), (torch.float8_e5m2, "e5m2")):
        codes, scale = rounded(x, x.abs().amax(), dtype)
        assert torch.equal(codes.double() * scale, fake(x, (0, 1), kind))
        assert codes.float().abs().max() > FORMATS[kind][2] / 2.5, "the range is used"
        assert torch.equal(rounded(x, torch.tensor(1e-3), dtype).codes.float().abs().max(), torch.tensor(
            FORMATS[kind][2])), "larger than its amax says"
        zeros = rounded(torch.zeros(3), torch.zeros(1), dtype)
        assert not zeros.codes.float().any()
        assert zeros.scale.isfinite().all()
        bad = rounded(torch.tensor([1.0, torch.inf]), torch.tensor([torch.inf]), dtype)
        assert (bad.codes.float() * bad.scale).isnan().all(), "divergence must show"
    powers = 2.0 ** torch.arange(-90, 90)
    assert torch.equal(power_of_two(powers), powers)
    assert torch.equal(power_of_two(powers * 1.001), powers * 2)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Choose between ``torch._scaled_mm``, which computes on a CPU too, and float32 products of rounded numbers."""

    def choose(used: bool) -> None:
        for module in (grouped, linear):
            monkeypatch.setattr(module, "has_fp8_products", lambda _device: used)

    return choose


def stepped(recipe: Fp8Options, operands: tuple[Tensor, Tensor, Tensor], counts: list[int]) -> tuple[Tensor, ...]:
    """Output and gradients of experts, then those of a dense layer that has the first expert's weights."""
    x_RK, weight_EKN, dy_RN = (operand.clone().requires_grad_() for operand in operands)
    y_RN = fp8_grouped_product(x_RK, weight_EKN, torch.tensor(counts).cumsum(0).int(), recipe)
    of_experts = y_RN, *torch.autograd.grad(y_RN, (x_RK, weight_EKN), dy_RN)
    layer = Fp8Linear(nn.Linear(*weight_EKN.shape[1:], bias=False), window=4)
    layer.weight.data = weight_EKN.detach()[0].T.contiguous()
    with fp8_autocast(recipe):
        y_RN = layer(x_RK)
    return *of_experts, y_RN, *torch.autograd.grad(y_RN, (x_RK, layer.weight), dy_RN)


@pytest.mark.parametrize("recipe", RECIPES_OF_TRAINING, ids=by_recipe)
def test_float32_products_of_rounded_numbers_are_scaled_fp8_products(
    recipe: Fp8Options, kernels: Callable[[bool], None]
) -> None:
    """To the last bit where float32 holds every sum, and else up to the order of the sums."""
    counts = [16, 0, 32]
    shapes = (48, 32), (3, 32, 16), (48, 16)
    whole = tuple(torch.randint(-8, 9, shape).float() for shape in shapes)
    for operand in whole:  # the largest everywhere, so that scales are alike and integers stay integers
        operand[..., 0], operand[..., 0, :] = 8, 8
    real = tuple(torch.randn(shape) for shape in shapes)
    found = {}
    for used in (True, False):
        kernels(used)
        found[used] = stepped(recipe, whole, counts), stepped(recipe, real, counts)
    for scaled, emulated in zip(found[True][0][:3], found[False][0][:3], strict=True):
        assert torch.equal(scaled, emulated)
    # By row torchao has bfloat16 from its kernel, and float32 where it emulates one.
    for at, (scaled, emulated) in enumerate(zip(found[True][1], found[False][1], strict=True)):
        assert_near(emulated, scaled.double(), 1e-6 if at < 3 or not recipe.by_row else 2.0**-8)


@pytest.mark.parametrize("recipe", RECIPES_OF_TRAINING, ids=by_recipe)
def test_operands_are_laid_out_as_gpus_demand(
    recipe: Fp8Options, monkeypatch: pytest.MonkeyPatch, kernels: Callable[[bool], None]
) -> None:
    """Rows on the left, columns on the right, sums over multiples of 16, E4M3 on the right: the CPU asks for none."""
    kernels(True)
    calls = []

    def spy(left: Tensor, right: Tensor, *scales: Tensor, out_dtype: torch.dtype) -> Tensor:
        assert left.is_contiguous()
        assert right.t().is_contiguous()
        assert left.shape[1] % 16 == 0
        assert right.dtype == torch.float8_e4m3fn
        assert [tuple(scale.shape) for scale in scales] == [(len(left), 1), (1, right.shape[1])]
        calls.append(left.dtype)
        return product(left, right, *scales, out_dtype=out_dtype)

    product = torch._scaled_mm
    monkeypatch.setattr(torch, "_scaled_mm", spy)
    x_RK, weight_EKN = torch.randn(24, 16, requires_grad=True), torch.randn(3, 16, 32, requires_grad=True)
    fp8_grouped_product(x_RK, weight_EKN, torch.tensor([5, 5, 24]).int(), recipe).square().sum().backward()
    backward = 2 if recipe.exact_weight_gradient else 4
    assert calls == [torch.float8_e4m3fn] * 2 + [torch.float8_e5m2] * backward


def torchao_fake(x: Tensor, axis: int | None, kind: str, recipe: Fp8Options) -> Tensor:
    """torchao's scale multiplies, and is rounded down to a power of two by row."""
    x = x.double()
    amax = x.abs().amax() if axis is None else x.abs().amax(axis, keepdim=True)
    scale = (FORMATS[kind][2] / amax).float().double()
    if recipe.name != "tensorwise":
        scale = 2.0 ** torch.floor(torch.log2(scale))
    return on_grid((x * scale).float().double(), kind) / scale


@pytest.mark.parametrize("recipe", RECIPES_OF_TRAINING, ids=by_recipe)
def test_dense_layers_forward_and_backward_are_fake_quantisation(recipe: Fp8Options) -> None:
    layer = Fp8Linear(nn.Linear(32, 16), window=4)
    x = torch.randn(2, 24, 32, requires_grad=True)
    dy = torch.randn(2, 24, 16) * 1e-3
    with fp8_autocast(recipe):
        y = layer(x)
    dx, dw, db = torch.autograd.grad(y, (x, layer.weight, layer.bias), dy)  # outside: it follows its forward pass

    by_row = recipe.name != "tensorwise"
    last, first = (1, 0) if by_row else (None, None)
    kind = "e4m3" if by_row else "e5m2"  # torchao's rowwise recipes use E4M3 for gradients as well
    x_RK, w_NK, dy_RN = x.detach().flatten(0, 1), layer.weight.detach(), dy.flatten(0, 1)
    expected_y = torchao_fake(x_RK, last, "e4m3", recipe) @ torchao_fake(w_NK, last, "e4m3", recipe).T
    w_for_dx = torchao_fake(w_NK, None if recipe.name == "rowwise_with_gw_hp" else first, "e4m3", recipe)
    expected_dx = torchao_fake(dy_RN, last, kind, recipe) @ w_for_dx
    if recipe.name == "rowwise_with_gw_hp":
        expected_dw = dy_RN.double().T @ x_RK.double()
    else:
        expected_dw = torchao_fake(dy_RN, first, kind, recipe).T @ torchao_fake(x_RK, first, "e4m3", recipe)
    assert_near(y.detach().flatten(0, 1), expected_y + layer.bias.detach(), 1e-6)
    assert_near(dx.flatten(0, 1), expected_dx, 1e-6)
    assert_near(dw, expected_dw, 1e-6)
    assert_near(db, dy_RN.double().sum(0), 1e-6)


def fp8_model(name: str = "images") -> Llama4:
    model, _ = twins(TINY if name == "images" else herds.VARIANTS[name])
    prepare_for_training(model).train()
    prepare_for_fp8(model, window=4)
    return model


def test_which_products_are_fp8() -> None:
    model, _ = twins(TINY)
    before = dict(model.named_parameters())
    converted = prepare_for_fp8(prepare_for_training(model))
    matrices = {name for name, shape in expected_tensors(TINY).items() if len(shape) > 1}
    exact = {name for name in matrices if set(EXACT) & set(name.split("."))} | {"vision_model.positional_embedding_vlm"}
    assert set(converted) == matrices - exact
    assert "layers.1.feed_forward.shared_expert.down_proj.weight" in converted
    assert "vision_model.model.layers.0.mlp.fc1.weight" in converted
    assert "multi_modal_projector.linear_1.weight" in converted
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    assert plain_state_dict(model).keys() == expected_tensors(TINY).keys()


def test_sizes_that_gpus_do_not_multiply_stay_exact() -> None:
    model = prepare_for_training(Llama4(herds.variant(dense_size=40)))
    assert not [name for name in prepare_for_fp8(model) if "layers.0.feed_forward" in name]


def test_the_switch() -> None:
    model, (plain, _) = fp8_model(), twins(TINY)
    plain.train()
    ids_BT = torch.tensor([[TINY.image_token_id] * 4 + herds.tokens(30)])
    pixels = torch.randn(1, 3, 28, 28)

    def run() -> Tensor:
        return model(ids_BT, pixels).detach()

    exact = run()
    torch.testing.assert_close(exact, plain(ids_BT, pixels), atol=1e-5, rtol=0)
    with fp8_autocast(Fp8Options("tensorwise")):
        tensorwise = run()
        with fp8_autocast(Fp8Options("rowwise")):
            rowwise = run()
            with fp8_autocast(None):
                assert torch.equal(run(), exact)
        assert torch.equal(run(), tensorwise)
        with pytest.raises(ZeroDivisionError), fp8_autocast(Fp8Options("rowwise")):
            raise ZeroDivisionError
        assert torch.equal(run(), tensorwise)
    assert torch.equal(run(), exact)
    for found in (tensorwise, rowwise):
        assert 0.005 < (found - exact).std() / exact.std() < 0.3
    assert not torch.equal(tensorwise, rowwise)


def test_layers_computed_again_are_fp8_again() -> None:
    """And seen once. Without the context torch notices that they are not the same computation."""
    mixture = fp8_model().decoder.layers[1].feed_forward
    x_BTD = torch.randn(1, 9, 64, requires_grad=True)

    def step(run: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        with fp8_autocast(Fp8Options("rowwise")):
            loss = run(x_BTD).square().sum()
        return torch.autograd.grad(loss, [x_BTD, *mixture.parameters()])

    plain = step(mixture)
    again = step(lambda x: checkpoint(mixture, x, use_reentrant=False, context_fn=recompute_contexts))
    for found, expected in zip(again, plain, strict=True):
        assert torch.equal(found, expected)
    window = mixture.shared_expert.up_proj.history.window
    assert torch.equal(window, window[0] * torch.tensor([1.0, 1, 0, 0]))
    assert window[0] > 0
    with pytest.raises(CheckpointError):
        step(lambda x: checkpoint(mixture, x, use_reentrant=False))


def test_bfloat16_autocast_around_fp8() -> None:
    model = fp8_model("moe-every-second-layer")
    ids_BT = torch.tensor([herds.tokens(30)])
    with torch.autocast("cpu", torch.bfloat16), fp8_autocast(Fp8Options("rowwise_with_gw_hp")):
        logits = model(ids_BT)
    assert logits.dtype == torch.bfloat16
    logits.float().logsumexp(-1).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_a_history_is_the_largest_of_its_window() -> None:
    history = AmaxHistory(3)
    for value, largest in ((5.0, 5.0), (1.0, 5.0), (2.0, 5.0), (1.0, 2.0), (0.5, 2.0), (0.5, 1.0)):
        history.record(torch.tensor(value))
        assert float(history.amax()) == largest


def test_histories_see_fp8_inputs_in_training_only() -> None:
    model = fp8_model("moe-every-second-layer")
    layer, mixture = model.decoder.layers[0].feed_forward, model.decoder.layers[1].feed_forward
    inputs: dict[str, Tensor] = {}
    layer.down_proj.register_forward_pre_hook(lambda _m, args: inputs.update(dense=args[0].detach()))
    mixture.experts.down_product.register_forward_pre_hook(
        lambda _m, args: inputs.update(x=args[0].detach(), ends=args[2]))
    ids_BT = torch.tensor([herds.tokens(40)])
    model(ids_BT)
    with fp8_autocast(Fp8Options()):
        model.eval()(ids_BT)
        assert not layer.down_proj.history.window.any()
        model.train()(ids_BT)
    assert layer.down_proj.history.window[:2].tolist() == [float(inputs["dense"].abs().max()), 0]
    rows = inputs["x"].tensor_split(inputs["ends"].tolist()[:-1])
    expected_E = torch.stack([part.abs().max() if len(part) else torch.zeros(()) for part in rows])
    torch.testing.assert_close(mixture.experts.down_product.history.amax(), expected_E)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Llama4, Path]:
    model = fp8_model()
    ids_BT = torch.tensor([[TINY.image_token_id] * 4 + herds.tokens(30)])
    with fp8_autocast(Fp8Options()):
        model(ids_BT, torch.randn(1, 3, 28, 28))
    # Products that no input met, and experts that no token met.
    model.decoder.layers[0].feed_forward.gate_proj.history.window.zero_()
    model.decoder.layers[1].feed_forward.experts.gate_up_product.history.window[:, 2] = 0
    directory = tmp_path_factory.mktemp("trained") / "model"
    save_checkpoint(directory, TINY, plain_state_dict(model).items())
    return model, directory


def test_trained_scales_are_a_calibration(exported: tuple[Llama4, Path], tmp_path: Path) -> None:
    model, directory = exported
    with open_checkpoint(directory) as checkpoint:
        description = save_amaxes(trained_amaxes(model), tmp_path / "scales", checkpoint)
        file = CalibrationFile.open(tmp_path / "scales", checkpoint.fingerprint())
        recipe = RECIPES["fp8"].with_high_precision(file.high_precision_parts)
        in_fp8 = {name for name, info in checkpoint.tensors.items()
                  if len(info.shape) > 1 and "embedding" not in name and isinstance(recipe.layout_of(name), Fp8Format)}
        with pytest.raises(HerdError, match="exists already"):
            save_amaxes(trained_amaxes(model), tmp_path / "scales", checkpoint)
    assert json.loads((tmp_path / "scales" / "calibration.json").read_text()) == description
    assert file.observer == "trained"
    assert in_fp8 == description["inputs"].keys(), "a build asks for exactly what is there"
    assert "layers.0.feed_forward.gate_proj.weight" not in in_fp8
    assert {name for name in in_fp8 if "self_attn" in name} == set()

    experts = model.decoder.layers[1].feed_forward.experts
    amax_E = experts.gate_up_product.history.amax()
    assert amax_E[2] == 0
    amax_E[2] = amax_E.max()
    assert torch.equal(file.input_amax("layers.1.feed_forward.experts.gate_up_proj"), amax_E)
    shared = model.decoder.layers[1].feed_forward.shared_expert
    for part in ("gate", "up"):
        found = file.input_amax(f"layers.1.feed_forward.shared_expert.{part}_proj.weight")
        assert found == shared.up_proj.history.amax() > 0
    fc1 = "vision_model.model.layers.0.mlp.fc1.weight"
    assert file.input_amax(fc1) == model.vision.vision_model.model.layers[0].mlp.fc1.history.amax()


def test_ranks_save_the_largest_of_all(exported: tuple[Llama4, Path], tmp_path: Path) -> None:
    model, directory = exported
    with open_checkpoint(directory) as checkpoint:
        save_amaxes(trained_amaxes(model, lambda amax: amax.clamp(min=1000.0)), tmp_path / "scales", checkpoint)
        file = CalibrationFile.open(tmp_path / "scales", checkpoint.fingerprint())
    assert float(file.input_amax("layers.0.feed_forward.gate_proj.weight")) == 1000


def test_nothing_is_saved_of_a_model_that_never_was_fp8(exported: tuple[Llama4, Path], tmp_path: Path) -> None:
    with open_checkpoint(exported[1]) as checkpoint, pytest.raises(HerdError, match="train with precision fp8"):
        save_amaxes(trained_amaxes(fp8_model()), tmp_path / "scales", checkpoint)
    assert not (tmp_path / "scales").exists()


def losses(recipe: Fp8Options | None, steps: int = 50) -> Tensor:
    """A tiny mixture learns a random Markov chain of 32 tokens, in bfloat16 and, with a recipe, FP8."""
    torch.manual_seed(0)
    config = herds.variant(num_layers=2, moe_layers=(1,), rope_layers=(True, False), chunked_layers=(True, False),
                           vocab_size=32, hidden_size=32, expert_size=32, dense_size=32, pad_token_id=None)
    model = prepare_for_training(Llama4(config)).train()
    prepare_for_fp8(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    chain = torch.softmax(2 * torch.randn(32, 32), -1)
    found = []
    for _ in range(steps):
        ids = torch.randint(32, (8, 1))
        for _ in range(32):
            ids = torch.cat((ids, chain[ids[:, -1]].multinomial(1)), 1)
        with torch.autocast("cpu", torch.bfloat16), fp8_autocast(recipe):
            logits = model(ids[:, :-1])
        loss = functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found)


def test_fp8_learns_as_bfloat16_does() -> None:
    bf16 = losses(None).unflatten(0, (-1, 10)).mean(1)
    assert bf16[-1] < 0.8 * bf16[0], "it learns"
    for recipe in RECIPES_OF_TRAINING:
        fp8 = losses(recipe).unflatten(0, (-1, 10)).mean(1)
        assert not torch.equal(fp8, bf16)
        torch.testing.assert_close(fp8, bf16, rtol=0.01, atol=0)
