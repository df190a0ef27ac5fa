"""Rotary tables of the full-size models against transformers'."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import Llama4Config
from transformers.models.llama4.modeling_llama4 import Llama4TextRotaryEmbedding, Llama4VisionRotaryEmbedding

from herdgraph.model.config import HerdConfig, RopeScaling, TextConfig, to_hf
from herdgraph.model.config.presets import MAVERICK, SCOUT
from herdgraph.model.llama4.rope import image_tables, inverse_frequencies

LLAMA31 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)


def _theirs(config: HerdConfig) -> Llama4Config:
    return Llama4Config(**{k: v for k, v in to_hf(config).items() if k not in ("architectures", "model_type")})


@pytest.mark.parametrize("text", [
    SCOUT.text, MAVERICK.text, replace(SCOUT.text, rope_scaling=LLAMA31), replace(SCOUT.text, rope_theta=10000.0),
], ids=["scout", "maverick", "smooth scaling", "another theta"])
def test_decoder_frequencies(text: TextConfig) -> None:
    theirs = Llama4TextRotaryEmbedding(_theirs(replace(SCOUT, text=text)).text_config)
    torch.testing.assert_close(inverse_frequencies(text), theirs.inv_freq, atol=0, rtol=1e-6)


def test_scout_divides_29_of_64_pairs_by_16() -> None:
    ratio = inverse_frequencies(replace(SCOUT.text, rope_scaling=None)) / inverse_frequencies(SCOUT.text)
    assert int((ratio > 15.9).sum()) == 29
    assert int((ratio < 1.1).sum()) == 35


def test_image_tables() -> None:
    assert SCOUT.vision is not None
    cos, sin = image_tables(SCOUT.vision)
    theirs = Llama4VisionRotaryEmbedding(_theirs(SCOUT).vision_config).freqs_ci[:, 0]
    assert cos.shape == (577, 44)
    torch.testing.assert_close(cos, theirs.real, atol=1e-6, rtol=0)
    torch.testing.assert_close(sin, theirs.imag, atol=1e-6, rtol=0)
    assert (cos[-1] == 1).all(), "the class token does not turn"
