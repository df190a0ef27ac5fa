"""Random weights: what a model says before it has learned, and that it learns alike at every width and depth."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from herdgraph.model.config import HerdConfig
from herdgraph.model.config.presets import PRESETS, TINY
from herdgraph.model.llama4.initialization import EMBEDDING_STD, initialize
from herdgraph.model.llama4.model import Llama4
from herdgraph.model.training.moe.experts import prepare_for_training
from herdgraph.model.training.optim import OptimizerOptions, optimizer_for, set_learning_rate


def random_model(config: HerdConfig, seed: int = 0) -> Llama4:
    torch.manual_seed(seed)
    return initialize(Llama4(config))


def small(config: HerdConfig, layers: int = 8, width: int = 64, **text: object) -> HerdConfig:
    """A configuration's structure with TINY's sizes and tower."""
    own = config.text
    return replace(TINY, vision=config.vision and TINY.vision, text=replace(
        own, vocab_size=TINY.text.vocab_size, hidden_size=width, num_layers=layers, num_heads=width // 16,
        num_kv_heads=max(1, width // 32), head_dim=16, expert_size=width, dense_size=2 * width,
        num_experts=min(8, own.num_experts), moe_layers=tuple(layer for layer in own.moe_layers if layer < layers),
        rope_layers=(own.rope_layers * layers)[:layers], chunked_layers=(own.chunked_layers * layers)[:layers],
        pad_token_id=0, bos_token_id=1, eos_token_ids=(2,), **text))  # type: ignore[arg-type]


def random_ids(config: HerdConfig, rows: int = 4, length: int = 64) -> Tensor:
    return torch.randint(3, min(490, config.text.vocab_size), (rows, length))


def loss_of(model: Llama4, ids_BT: Tensor, pixels: Tensor | None = None) -> Tensor:
    """Of random labels, so that only a model without opinions has ln V."""
    logits_BTV = model(ids_BT, pixels)
    return functional.cross_entropy(logits_BTV.flatten(0, 1), torch.randint(logits_BTV.shape[-1], (ids_BT.numel(),)))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_begins_with_even_chances(name: str, tied: bool) -> None:
    config = small(PRESETS[name], tie_word_embeddings=tied)
    model, ids_BT = random_model(config), random_ids(config, rows=16)
    pixels = torch.randn(1, 3, 28, 28) if config.vision else None
    if config.vision:
        ids_BT[0, :4] = config.image_token_id
    with torch.no_grad():
        assert float(loss_of(model, ids_BT, pixels)) == pytest.approx(math.log(512), abs=0.1)
        own = functional.cross_entropy(model(ids_BT, pixels).flatten(0, 1), ids_BT.flatten())
    assert float(own) > math.log(512) - 3, "nor does it repeat what it read"


@pytest.mark.parametrize("width", [16, 256])
def test_many_words_and_a_tied_head(width: int) -> None:
    """torch's defaults begin at 227 for 8,192 words and a width of 256: ln V is 9."""
    text = replace(small(TINY, layers=1, width=width).text, vocab_size=8192, tie_word_embeddings=True)
    config = HerdConfig(text=text)
    with torch.no_grad():
        torch.manual_seed(0)
        if width == 256:
            assert float(loss_of(Llama4(config), random_ids(config))) > 100
        loss = float(loss_of(random_model(config), random_ids(config, rows=16)))
    assert loss == pytest.approx(math.log(8192), abs=0.1)


def test_gradients_do_not_grow_with_depth() -> None:
    """Of a layer: there are more of them."""
    typical, first_to_last = [], []
    for layers in (2, 8, 32):
        config = small(PRESETS["scout"], layers, width=32)
        model = random_model(config)
        loss_of(model, random_ids(config)).backward()
        of_layers = [torch.stack([p.grad.norm() for p in layer.parameters() if p.grad is not None]).norm()
                     for layer in model.decoder.layers]
        typical.append(float(torch.stack(of_layers).square().mean().sqrt()))
        first_to_last.append(float(of_layers[0] / of_layers[-1]))
    assert all(deep < 1.1 * shallow for shallow, deep in pairwise(typical)), typical
    assert all(ratio < 2 for ratio in first_to_last), first_to_last


def test_features_of_pictures_are_as_large_as_embeddings() -> None:
    model = random_model(TINY)
    assert model.vision is not None
    with torch.no_grad():
        features = model.vision(torch.randn(4, 3, 28, 28))
    assert float(features.square().mean().sqrt()) == pytest.approx(EMBEDDING_STD, rel=0.5)


def changes(width: int, base_width: int | None, *, tied: bool) -> tuple[float, float]:
    """How far three steps of AdamW move the residual stream after the last layer and the logits, as rms."""
    text = replace(PRESETS["scout"].text, num_experts=2)
    config = small(HerdConfig(text=text), layers=2, width=width, tie_word_embeddings=tied)
    model, ids_BT = prepare_for_training(random_model(config)), random_ids(config, rows=2, length=32)
    seen: list[Tensor] = []
    model.decoder.norm.register_forward_pre_hook(lambda _module, args: seen.append(args[0].detach()))
    optimizer = optimizer_for(model, OptimizerOptions(base_width=base_width))
    set_learning_rate(optimizer, 2e-3)
    logits = [model(ids_BT)]
    for _ in range(3):
        functional.cross_entropy(logits[-1][:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        logits.append(model(ids_BT))
    return tuple(float((after - before).detach().square().mean().sqrt())  # type: ignore[return-value]
                 for before, after in ((seen[0], seen[-1]), (logits[0], logits[-1])))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_steps_change_as_much_at_every_width(tied: bool) -> None:
    """The coordinate check of Tensor Programs V; without the rule a step goes the further the wider the model is."""
    by_rule, plain = [changes(width, 64, tied=tied) for width in (64, 128, 256, 512)], changes(512, None, tied=tied)
    streams, logits = zip(*by_rule, strict=True)
    assert max(streams) < 1.3 * min(streams), streams
    assert plain[0] > 3 * streams[0], plain
    if not tied:  # what a tied head says is its embeddings' at first, which learn at one rate by the rule and without
        assert max(logits) < 1.8 * min(logits), logits
        assert plain[1] > 2 * max(logits), plain
