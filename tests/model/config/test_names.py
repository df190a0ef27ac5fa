"""Canonical names are what the torch modules and transformers' modules are made of."""

from __future__ import annotations

from dataclasses import replace

import torch

from herdgraph.model.config.names import expected_tensors
from herdgraph.model.config.presets import TINY
from herdgraph.model.llama4.model import Llama4
from support import herds


def test_expected_tensors_match_modules() -> None:
    for config in (TINY, *herds.VARIANTS.values()):
        with torch.device("meta"):
            model = Llama4(config)
        parts = [part for part in (model.decoder, model.vision) if part is not None]
        found = {name: tuple(p.shape) for part in parts for name, p in part.named_parameters()}
        assert found == expected_tensors(config)


def test_expected_tensors_match_transformers() -> None:
    """Names are Hugging Face's without their prefix."""
    prefixes = ("language_model.model.", "language_model.")
    found = set()
    for name in herds.reference(TINY).state_dict():
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
        found.add(name.removeprefix(prefix))
    assert found == set(expected_tensors(TINY))


def test_expected_tensors_of_tied_head() -> None:
    tied = replace(TINY, text=replace(TINY.text, tie_word_embeddings=True))
    assert set(expected_tensors(TINY)) - set(expected_tensors(tied)) == {"lm_head.weight"}
