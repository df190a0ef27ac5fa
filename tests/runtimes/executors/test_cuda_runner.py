"""CudaRunner on a CPU: logits of the canonical graph, whatever is padded, recorded, shared or sent back."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from herdgraph.errors import HerdError
from herdgraph.model.config import HerdConfig
from herdgraph.model.config.presets import TINY
from herdgraph.runtimes import Sequence
from herdgraph.runtimes.executors.ort.cuda.memory import BLOCK_TOKENS
from herdgraph.runtimes.executors.ort.cuda.runner import CudaRunner
from herdgraph.runtimes.executors.runner import Step
from support import herds, token_lists
from support.cuda_twins import twin_runner

CHUNK, IMAGE = TINY.text.attention_chunk_size, TINY.image_token_id
BOUND = 1e-4


@cache
def runner_of(config: HerdConfig, cache_bytes: int = 16 << 20) -> CudaRunner:
    return twin_runner(token_lists.canonical(config), config, cache_bytes)


@cache
def reference_of(config: HerdConfig) -> token_lists.Reference:
    return token_lists.Reference(token_lists.canonical(config), config)


@pytest.fixture
def runner() -> CudaRunner:
    return runner_of(TINY)


def wanted(ids: list[int], features: np.ndarray | None = None) -> np.ndarray:
    """Logits of all tokens."""
    none = np.zeros((0, TINY.text.hidden_size), np.float32)
    return reference_of(TINY).logits(ids, none if features is None else features)


def begun(runner: CudaRunner, ids: list[int]) -> Sequence:
    sequence = runner.new_sequence()
    for part in runner.chunk_prompt(0, ids):
        runner.step([Step(sequence, part, [])])
    return sequence


@pytest.mark.parametrize("config", [herds.variant(), *(herds.VARIANTS[name] for name in (
    "no-chunks", "rope-everywhere", "no-temperature", "128-experts"))], ids=str)
def test_ragged_calls_give_the_logits_of_the_canonical_graph(config: HerdConfig) -> None:
    """Prompts and tokens side by side, over chunk boundaries."""
    runner, lengths = runner_of(config), [37, 5, 21]
    ids = [herds.tokens(length, seed) for seed, length in enumerate(lengths)]
    sequences = [runner.new_sequence() for _ in ids]
    found: list[list[np.ndarray]] = [[] for _ in ids]
    for call in token_lists.schedule(lengths, runner.attention_chunk):
        rows = iter(runner.step([Step(sequences[number], ids[number][past : past + count], range(count))
                                 for number, past, count in call]))
        for number, _, count in call:
            found[number] += [next(rows) for _ in range(count)]
    for rows, own in zip(found, ids, strict=True):
        np.testing.assert_allclose(np.stack(rows), reference_of(config).logits(own), atol=BOUND)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_tokens_of_several_sequences(runner: CudaRunner, count: int) -> None:
    """Calls that are recorded, filled up with rows of nobody's, across a chunk boundary."""
    pasts = [CHUNK - 2, 3, CHUNK, 2 * CHUNK - 1, 9][:count]
    ids = [herds.tokens(past + 4, seed) for seed, past in enumerate(pasts)]
    sequences = [begun(runner, own[:past]) for own, past in zip(ids, pasts, strict=True)]
    for step in range(4):
        found = runner.decode_batch(sequences, [own[past + step] for own, past in zip(ids, pasts, strict=True)])
    np.testing.assert_allclose(found, [wanted(own)[-1] for own in ids], atol=BOUND)


def test_a_wider_table_is_another_recorded_call(runner: CudaRunner) -> None:
    """Blocks beyond the narrowest table: a sequence of more than 2,048 tokens would take too long to compute."""
    narrow, wide = runner._bucket(3, 1), runner._bucket(3, 17)
    assert (narrow.sequences, narrow.whole, wide.whole) == (4, 16, 32)
    assert narrow.chunked == wide.chunked == 1


def test_only_what_is_wanted_comes_back(runner: CudaRunner) -> None:
    ids = herds.tokens(9)
    logits = wanted(ids)
    best = int(logits[-1].argmax())
    steps = [Step(runner.new_sequence(), ids, [8], greedy=True), Step(runner.new_sequence(), ids, [2, 8]),
             Step(runner.new_sequence(), ids, [8], greedy=True, never=[best]), Step(runner.new_sequence(), ids, [])]
    rows = runner.rows(steps)
    assert rows[0] == best
    np.testing.assert_allclose(np.stack(rows[1:]), [logits[2], logits[8], logits[8]], atol=BOUND)
    sequence = begun(runner, ids[:8])
    assert runner.decode_greedy(sequence, ids[8]) == best


def test_prompts_without_wanted_rows(runner: CudaRunner) -> None:
    assert runner.step([Step(runner.new_sequence(), herds.tokens(5), [])]).shape == (0, TINY.text.vocab_size)


def test_forks_share_their_past_and_nothing_else(runner: CudaRunner) -> None:
    """The block that both write to is copied on the device."""
    ids, more = herds.tokens(20), [herds.tokens(3, seed) for seed in (1, 2)]
    sequence = begun(runner, ids)
    twin = sequence.fork()
    for step in range(3):
        found = runner.decode_batch([sequence, twin], [more[0][step], more[1][step]])
    np.testing.assert_allclose(found, [wanted(ids + own)[-1] for own in more], atol=BOUND)


@pytest.mark.parametrize("length", [CHUNK + 3, CHUNK, CHUNK - 1, 4])
def test_what_was_forgotten_leaves_no_trace(runner: CudaRunner, length: int) -> None:
    ids = herds.tokens(CHUNK + 8)
    sequence = begun(runner, ids)
    runner.truncate(sequence, length)
    np.testing.assert_allclose(runner.decode(sequence, 7), wanted([*ids[:length], 7])[-1], atol=BOUND)


def test_pictures_among_texts(runner: CudaRunner) -> None:
    features = np.random.default_rng(0).normal(size=(4, TINY.text.hidden_size)).astype(np.float32)
    ids, text = [7, *[IMAGE] * 4, 9], herds.tokens(6)
    found = runner.step([Step(runner.new_sequence(), text, [5]), Step(runner.new_sequence(), ids, [5], features)])
    np.testing.assert_allclose(found, [wanted(text)[-1], wanted(ids, features)[-1]], atol=BOUND)


def test_memory_is_divided_between_kinds_of_layers() -> None:
    runner = runner_of(TINY, 1 << 20)
    whole, chunked = runner.pools.whole, runner.pools.chunked
    assert whole.budget is not chunked.budget
    assert whole.budget.most + chunked.budget.most + whole.cost + chunked.cost == 1 << 20, "a block of each is nobody's"
    with pytest.raises(HerdError, match=r"^keys and values need [^\n]* \(gpu_memory on a GPU\)$"):
        runner.prefill(runner.new_sequence(), [5] * BLOCK_TOKENS * (whole.capacity + 1), np.zeros((0, 64), np.float32),
                       all_positions=False)
    sequences = [begun(runner, [5]) for _ in range(min(whole.capacity, chunked.capacity) - 1)]
    with pytest.raises(HerdError, match="keys and values need"):
        runner.decode(runner.new_sequence(), 5)
    np.testing.assert_allclose(runner.decode(sequences.pop(), 6), wanted([5, 6])[-1], atol=BOUND)
    runner.decode(runner.new_sequence(), 5)


def test_warming_up_leaves_nothing_behind(runner: CudaRunner) -> None:
    used = [budget.used for budget in runner.pools.budgets]
    sequence = begun(runner, herds.tokens(6))
    runner.warm_up(3)
    np.testing.assert_allclose(runner.decode(sequence, 7), wanted([*herds.tokens(6), 7])[-1], atol=BOUND)
    del sequence
    assert {size.sequences for size in runner._recorded} >= {1, 2, 4}
    assert [budget.used for budget in runner.pools.budgets] == used


def test_closing_gives_the_memory_back() -> None:
    runner = twin_runner(token_lists.canonical(TINY), TINY)
    begun(runner, [5])
    runner.close()
    with pytest.raises(HerdError, match="the engine was closed"):
        runner.require_open()
