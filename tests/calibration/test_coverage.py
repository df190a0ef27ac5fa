"""Experts that the router neglects: shown real inputs, named, and never allowed to change what the model says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from herdgraph.calibration import stream as streams
from herdgraph.calibration.calibrate import Options, calibrate
from herdgraph.calibration.coverage import Coverage
from herdgraph.calibration.matmul_backends import Exact, MatmulBackend
from herdgraph.calibration.measure import Measured, measure
from herdgraph.calibration.recording import CalibrationObserver
from herdgraph.calibration.stream import DecoderStream, Run, States
from herdgraph.calibration.vision_stream import VisionStream
from herdgraph.calibration.windows import Data, Window
from herdgraph.errors import HerdError
from herdgraph.model.checkpoint import Checkpoint, open_checkpoint
from herdgraph.model.config import HerdConfig
from herdgraph.model.config.presets import TINY
from herdgraph.model.llama4.model import Llama4
from herdgraph.model.quantization.e4m3 import E4M3_MAX, to_e4m3
from support import herds

WINDOWS = [herds.tokens(70, seed) for seed in range(3)]
DATA = Data([Window(window) for window in WINDOWS], [])
TOKENS = 210


def skewed(config: HerdConfig, directory: Path, noise: float = 0.02) -> Path:
    """A checkpoint whose routers send nearly all tokens to two experts: all rows lie along one direction."""
    herds.save(config, directory)
    tensors = load_file(directory / "model.safetensors")
    for name in [name for name in tensors if name.endswith("router.weight")]:
        experts, width = tensors[name].shape
        direction = torch.randn(width) * width**-0.5
        slopes = torch.linspace(-1, 1, experts)[:, None] * 2
        tensors[name] = slopes * direction + noise * torch.randn(experts, width) * width**-0.5
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="module", params=[(4, 1), (16, 1), (128, 1), (16, 2)], ids=["4", "16", "128", "16-top-2"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    experts, top_k = request.param
    torch.manual_seed(0)
    config = herds.variant(num_experts=experts, top_k=top_k)
    return skewed(config, tmp_path_factory.mktemp("skewed"))


def measured(checkpoint: Checkpoint, work: Path, **options: int) -> Measured:
    return measure(checkpoint, DATA, work, key="", **options)


def test_every_expert_is_shown_real_inputs(directory: Path, tmp_path: Path) -> None:
    with open_checkpoint(directory) as checkpoint:
        found = measured(checkpoint, tmp_path / "work", min_tokens_shown=24)
        text = checkpoint.config.text
    assert set(found.coverage.own) == set(text.moe_layers) == {1, 3}
    assert found.coverage.below(1), "the router neglects some"
    for layer in text.moe_layers:
        own, shown = found.coverage.own[layer], found.coverage.shown[layer]
        assert own.sum() == TOKENS * text.top_k
        assert torch.equal(shown, (24 - own).clamp(min=0))
        for part in ("gate_up_proj", "down_proj"):
            name = f"layers.{layer}.feed_forward.experts.{part}"
            assert found.inputs[name]["rows"] == (own + shown).tolist()
            for observer in ("max", "percentile", "mse", "entropy"):
                amax = found.amaxes[f"{observer}/{name}"]
                assert amax.shape == (text.num_experts,)
                assert (amax > 1e-4).all()
                assert amax.isfinite().all()
            # Scales are of what each expert saw, not lent by the one that saw most.
            assert len(found.amaxes[f"max/{name}"].unique()) == text.num_experts


def test_more_tokens_than_there_are_means_all(directory: Path, tmp_path: Path) -> None:
    with open_checkpoint(directory) as checkpoint:
        found = measured(checkpoint, tmp_path / "work", min_tokens_shown=10**6)
    for layer, own in found.coverage.own.items():
        assert (own + found.coverage.shown[layer] == TOKENS).all()


def test_tokens_that_were_closest_to_being_sent_are_shown() -> None:
    logits = torch.tensor([[3.0, 1.0, -2.0], [2.0, 1.9, -9.0], [1.0, 0.0, -1.0], [0.0, 4.0, -1.0]])
    coverage = Coverage(min_tokens_shown=3)
    coverage.routed(7, logits, logits.topk(1).indices)
    assert coverage.own[7].tolist() == [3, 1, 0]
    assert coverage.shown[7].tolist() == [0, 2, 3]
    assert coverage.extra_tokens(7, 0).tolist() == []
    assert coverage.extra_tokens(7, 1).tolist() == [0, 1], "highest logits of tokens not its own, in order"
    assert coverage.extra_tokens(7, 2).tolist() == [0, 2, 3]
    coverage.routed(9, logits.flip(1), logits.flip(1).topk(1).indices)
    assert coverage.extra_tokens(9, 2).tolist() == [], "of the layer that was routed last"


def test_an_expert_sees_its_token_scaled_by_its_own_logit() -> None:
    """What Coverage shows is x · sigmoid(logit) for the tokens of the list, and is thrown away."""
    config = herds.variant(num_experts=3)
    stream = DecoderStream(_Ones(config))
    seen: dict[int | None, list[torch.Tensor]] = {}

    class Watch(Exact):
        def __call__(self, name: str, x: torch.Tensor, *rest: Any) -> torch.Tensor:
            if name.endswith("gate_up_proj") and len(x):
                seen.setdefault(rest[1], []).append(x)
            return super().__call__(name, x, *rest)

    with torch.inference_mode(), stream.layer(1) as layer:
        layer.feed_forward.router.weight = torch.nn.Parameter(torch.randn(3, 64) * 0.1)
        x = torch.randn(9, 64)
        normed = layer.post_attention_layernorm(x)
        logits = layer.feed_forward.router(normed)
        stream.feed_forward(1, layer, [Run(States(x.clone(), [9]), Watch())], Coverage(min_tokens_shown=9))
    for expert in range(3):
        own = logits.argmax(-1) == expert
        scaled = normed * torch.sigmoid(logits[:, expert, None])
        expected = [scaled[rows] for rows in (own, ~own) if rows.any()]
        assert all(torch.equal(a, b) for a, b in zip(seen[expert], expected, strict=True))


class _Ones:
    """A source whose weights are all small and positive."""

    def __init__(self, config: HerdConfig) -> None:
        from herdgraph.model.config.names import expected_tensors

        self.config, self._shapes = config, expected_tensors(config)

    def read(self, name: str, index: int | None = None) -> torch.Tensor:
        shape = self._shapes[name] if index is None else self._shapes[name][1:]
        return torch.full(shape, 0.01)


def test_sending_all_tokens_through_all_experts_shows_nothing() -> None:
    """The formulation of Hugging Face and Meta: minus infinity for what was not chosen, its sigmoid times the token.

    However many rows an expert is forced to run, those that it was not chosen for are zeros, and a scale made of them
    divides zero by zero.
    """
    torch.manual_seed(0)
    x_TD, logits_TE = torch.randn(200, 32), torch.randn(200, 4) + torch.tensor([4.0, 3.0, -5.0, -9.0])
    best = logits_TE.topk(1)
    scores_TE = torch.sigmoid(torch.full_like(logits_TE, -torch.inf).scatter(1, best.indices, best.values))
    forced = [x_TD * scores_TE[:, expert, None] for expert in range(4)]
    dead = [expert for expert in range(4) if forced[expert].abs().max() == 0]
    assert dead == [2, 3]
    scale = forced[3].abs().max() / E4M3_MAX
    assert to_e4m3(forced[3] / scale).float().isnan().all()
    coverage, observed = Coverage(min_tokens_shown=16), CalibrationObserver(TINY.text)
    coverage.routed(1, logits_TE, best.indices)
    for expert in range(4):
        rows = torch.cat((torch.where(best.indices[:, 0] == expert)[0], coverage.extra_tokens(1, expert)))
        scaled = x_TD[rows] * torch.sigmoid(logits_TE[rows, expert, None])
        observed("layers.1.feed_forward.experts.gate_up_proj", scaled, torch.zeros(32, 2), expert)
    amax = observed.amaxes()["max/layers.1.feed_forward.experts.gate_up_proj"]
    assert (amax > 0).all()
    assert len(amax.unique()) == 4


@torch.inference_mode()
def streamed(
    checkpoint: Checkpoint, windows: list[list[int]], backend: MatmulBackend, coverage: Coverage | None = None,
    features: list[torch.Tensor | None] | None = None,
) -> torch.Tensor:
    """Logits of all windows."""
    stream = DecoderStream(checkpoint)
    x_ND = stream.embed(windows, features or [None] * len(windows))
    run = Run(States(x_ND, [len(window) for window in windows]), backend)
    for index in range(checkpoint.config.text.num_layers):
        with stream.layer(index) as layer:
            stream.attend(layer, [run])
            stream.feed_forward(index, layer, [run], coverage)
    with stream.head() as head:
        return head(x_ND, backend)


def test_watching_changes_nothing(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, whatever is shown to the experts, and the same model as torch's and transformers'."""
    monkeypatch.setattr(streams, "BLOCK", 64)  # blocks that end inside of windows
    with open_checkpoint(directory) as checkpoint:
        exact = streamed(checkpoint, WINDOWS, Exact())
        coverage = Coverage(min_tokens_shown=50)
        observer = CalibrationObserver(checkpoint.config.text)
        watched = streamed(checkpoint, WINDOWS, observer, coverage)
        assert sum(int(shown.sum()) for shown in coverage.shown.values()) > 0
        assert torch.equal(exact, watched)
        model = Llama4.from_checkpoint(checkpoint).eval()
        with torch.inference_mode():
            whole = torch.cat([model(torch.tensor([window]))[0] for window in WINDOWS])
    torch.testing.assert_close(exact, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["moe-every-layer", "dense", "top-2", "tied", "1-expert", "chunk-5", "gqa-3"])
def test_a_stream_is_transformers_model(name: str, tmp_path: Path) -> None:
    model = herds.save(herds.VARIANTS[name], tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        found = streamed(checkpoint, WINDOWS, Exact())
    expected = torch.cat([herds.logits(model, window) for window in WINDOWS])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_stream_sees(tmp_path: Path) -> None:
    model, ids = herds.save(TINY, tmp_path), [*herds.tokens(6), *[500] * 8, *herds.tokens(20)]
    pixels = torch.randn(2, 3, 28, 28)
    with open_checkpoint(tmp_path) as checkpoint:
        with torch.inference_mode():
            features = VisionStream(checkpoint).features(pixels, Exact())
        found = streamed(checkpoint, [WINDOWS[0], ids], Exact(), features=[None, features])
    torch.testing.assert_close(found[len(WINDOWS[0]) :], herds.logits(model, ids, pixels), atol=1e-5, rtol=1e-4)


def test_too_few_tokens_fail_or_warn(directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = Options(hessians=False, under_covered="fail", min_tokens=1000)
    with open_checkpoint(directory) as checkpoint:
        experts = checkpoint.config.text.num_experts
        with pytest.raises(HerdError, match=rf"{2 * experts} experts got fewer than 1000 tokens") as caught:
            calibrate(checkpoint, tmp_path / "out", DATA, options)
        assert not (tmp_path / "out").exists()
        assert "layer 1 expert 0 (" in str(caught.value)
        assert "--min-tokens" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400, "names some, counts the rest"
        found = calibrate(checkpoint, tmp_path / "out", DATA, replace(options, under_covered="warn"))
    assert f"{2 * experts} experts got fewer than 1000 tokens from the router (layer 1 expert 0" in caplog.text
    own = {int(layer): counts for layer, counts in found["coverage"]["own"].items()}
    expected = [[layer, expert] for layer in (1, 3) for expert in np.flatnonzero(np.array(own[layer]) == 0)]
    assert found["coverage"]["dead"] == expected
    assert expected


def test_experts_with_enough_tokens_pass(tmp_path: Path) -> None:
    coverage = Coverage(min_tokens_shown=2)
    logits = torch.eye(3).repeat(4, 1)
    coverage.routed(0, logits, logits.topk(1).indices)
    coverage.require(4)
    assert functional.one_hot(logits.argmax(1)).sum(0).tolist() == coverage.own[0].tolist()
    with pytest.raises(HerdError, match="3 experts got fewer than 5"):
        coverage.require(5)
