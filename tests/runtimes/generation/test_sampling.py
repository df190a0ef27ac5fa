"""Sampling: each filter against its definition, determinism, wrong options."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from herdgraph.errors import HerdError
from herdgraph.runtimes.generation.penalties import Penalties
from herdgraph.runtimes.generation.sampling import Sampler, Sampling, _nucleus, log_softmax, softmax

LOGITS = np.random.default_rng(0).normal(0, 2, 200).astype(np.float32)


def _drawn(options: Sampling, logits: np.ndarray = LOGITS, seen: tuple[int, ...] = (), draws: int = 3000) -> np.ndarray:
    sampler, penalties = Sampler(options), Penalties(options, seen)
    return np.bincount([sampler(penalties.apply(logits)) for _ in range(draws)], minlength=len(logits))


def test_greedy_is_the_most_likely_and_leaves_logits_alone() -> None:
    before = LOGITS.copy()
    assert Sampler(Sampling())(LOGITS) == LOGITS.argmax()
    Penalties(Sampling(repetition_penalty=2.0), [1, 2]).apply(LOGITS)
    np.testing.assert_array_equal(LOGITS, before)


@pytest.mark.parametrize("options", [
    {"temperature": 0.7, "top_k": 12}, {"temperature": 1.0, "top_p": 0.6}, {"temperature": 1.3, "min_p": 0.2},
    {"temperature": 0.6, "top_k": 50, "top_p": 0.9, "min_p": 0.05}, {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 0.8, "repetition_penalty": 1.4, "top_k": 8},
], ids=str)
def test_filters_are_transformers(options: dict[str, float]) -> None:
    """The set of reachable tokens and their frequencies against transformers' logits warpers."""
    seen = (3, 5, int(LOGITS.argmax()))
    warpers = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(options.get("repetition_penalty", 1.0)),
                                   TemperatureLogitsWarper(options["temperature"])])
    if "top_k" in options:
        warpers.append(TopKLogitsWarper(options["top_k"]))
    if "top_p" in options:
        warpers.append(TopPLogitsWarper(options["top_p"]))
    if "min_p" in options:
        warpers.append(MinPLogitsWarper(options["min_p"]))
    expected = warpers(torch.tensor([seen]), torch.from_numpy(LOGITS[None].copy()))[0].softmax(-1).numpy()
    counts = _drawn(Sampling(seed=1, **options), seen=seen)
    assert set(np.flatnonzero(counts)) <= set(np.flatnonzero(expected))
    np.testing.assert_allclose(counts / counts.sum(), expected, atol=0.035)


def test_seed_decides() -> None:
    options = {"temperature": 1.0}
    samplers = [Sampler(Sampling(seed=seed, **options)) for seed in (1, 1, 2)]
    first, again, other = ([sampler(LOGITS) for _ in range(20)] for sampler in samplers)
    assert first == again != other


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 250), st.floats(0.01, 1.0), st.floats(0, 1), st.integers(0, 5))
def test_something_is_always_drawn_within_the_filters(k: int, p: float, min_p: float, seed: int) -> None:
    token = Sampler(Sampling(temperature=1.0, top_k=k, top_p=p, min_p=min_p, seed=seed))(LOGITS)
    probabilities = softmax(LOGITS)
    rank = int((LOGITS[token] < LOGITS).sum())
    assert k == 0 or rank < k
    assert probabilities[token] >= min_p * probabilities.max() * (1 - 1e-5)


@settings(max_examples=50, deadline=None)
@given(st.floats(0.01, 0.999), st.integers(0, 9), st.sampled_from([0.3, 1.0, 4.0]))
def test_a_nucleus_without_sorting_is_the_sorted_one(p: float, seed: int, spread: float) -> None:
    probabilities = softmax(np.random.default_rng(seed).normal(0, spread, 9000).astype(np.float32))
    order = np.argsort(-probabilities, kind="stable")
    sums = np.cumsum(probabilities[order])
    wanted = order[sums - probabilities[order] < p]
    np.testing.assert_array_equal(_nucleus(probabilities, p), wanted)


def test_the_lowest_temperature_is_greedy() -> None:
    assert Sampler(Sampling(temperature=1e-6, seed=1))(LOGITS) == LOGITS.argmax()


def test_logprobs() -> None:
    entry = Sampler(Sampling(logprobs=3)).logprob(LOGITS, 7, str)
    expected = torch.from_numpy(LOGITS).log_softmax(-1).numpy()
    assert entry.logprob == pytest.approx(expected[7], abs=1e-5)
    assert [token.token_id for token in entry.top] == list(np.argsort(-LOGITS)[:3])
    assert (entry.text, entry.top[0].text) == ("7", str(LOGITS.argmax()))
    np.testing.assert_allclose(log_softmax(LOGITS), expected, atol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_not_finite_are_an_error(value: float, temperature: float) -> None:
    logits = LOGITS.copy()
    logits[3] = value
    with pytest.raises(HerdError, match=f"the largest logit is {value}"):
        Sampler(Sampling(temperature=temperature))(logits)
    logits[3] = -np.inf  # what is masked stays possible
    assert Sampler(Sampling(temperature=temperature, seed=1))(logits) != 3


@pytest.mark.parametrize(("options", "message"), [
    ({"temperature": -1}, "temperature is -1"), ({"top_p": 0}, "top_p is 0"), ({"top_p": 1.5}, "top_p is 1.5"),
    ({"top_k": -1}, "top_k is -1"), ({"min_p": 2}, "min_p is 2"),
    ({"repetition_penalty": 0}, "repetition_penalty is 0"),
    ({"logprobs": -1}, "logprobs is -1"), ({"seed": -1}, "seed is -1, it must be a whole number, 0 or more"),
    ({"temperature": 1e-320}, "temperature is 1e-320"), ({"temperature": float("inf")}, "temperature is inf"),
    ({"temperature": float("nan")}, "temperature is nan"),
    ({"repetition_penalty": float("inf")}, "repetition_penalty is inf"),
    ({"temperature": "hot"}, "temperature is 'hot'"), ({"top_k": 1.5}, "top_k is 1.5, it must be a whole number"),
    ({"seed": "x"}, "seed is 'x'"), ({"logprobs": True}, "logprobs is True"), ({"logprobs": 10**5}, "within 0 and 100"),
    ({"top_p": None}, "top_p is None"), ({"min_p": []}, r"min_p is \[\]"),
])
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(HerdError, match=message):
        Sampling(**options)
