"""PagedRunner: a sequence gets the same bits alone and among others, whatever the call holds besides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from herdgraph.errors import HerdError
from herdgraph.export.pipeline import build_bundle
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.config.presets import TINY
from herdgraph.model.quantization.recipes import RECIPES
from herdgraph.runtimes import Engine, Sequence
from herdgraph.runtimes.executors.ort.paged import KEPT_BINDINGS, PagedRunner
from herdgraph.runtimes.executors.runner import Step
from support import herds

CHUNK = TINY.text.attention_chunk_size


class Case(NamedTuple):
    """A bundle and how it is run."""

    recipe: str
    caches: str
    threads: int


CASES = [Case("fp32", "float", 1), Case("fp32", "float", 2), Case("int8", "int8", 1), Case("int4", "float16", 2)]
Load = Callable[[Case], PagedRunner]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    directory = tmp_path_factory.mktemp("paged")
    herds.save(herds.variant(), directory / "checkpoint")

    @cache
    def loaded(case: Case) -> PagedRunner:
        bundle = directory / f"{case.recipe}-{case.caches}"
        if not bundle.exists():
            recipe = replace(RECIPES[case.recipe], caches=case.caches)  # type: ignore[arg-type]
            with open_checkpoint(directory / "checkpoint") as checkpoint:
                build_bundle(checkpoint, bundle, recipe=recipe)
        decoder = Engine.load(bundle, threads=case.threads)._decoder
        assert isinstance(decoder, PagedRunner)
        return decoder

    return loaded


@pytest.fixture(params=CASES, ids=lambda case: "-".join(map(str, case)))
def runner(request: pytest.FixtureRequest, load: Load) -> PagedRunner:
    return load(request.param)


@pytest.fixture
def fp32(load: Load) -> PagedRunner:
    return load(CASES[0])


def _append(runner: PagedRunner, sequence: Sequence, ids: list[int]) -> np.ndarray:
    """Logits of all tokens, in calls that end with attention chunks."""
    return np.concatenate([runner.step([Step(sequence, part, range(len(part)))]).copy()
                           for part in runner.chunk_prompt(len(sequence), ids)])


def _alone(runner: PagedRunner, ids: list[int]) -> np.ndarray:
    """Logits of a fresh sequence, token by token."""
    sequence = runner.new_sequence()
    return np.stack([runner.decode(sequence, token).copy() for token in ids])


def _started(runner: PagedRunner, ids: list[int]) -> Sequence:
    sequence = runner.new_sequence()
    if ids:
        _append(runner, sequence, ids)
    return sequence


def test_prompts_and_tokens_in_one_call_are_what_each_is_alone(runner: PagedRunner) -> None:
    """Two prefill chunks of other lengths, and three single tokens behind pasts below, at and over a chunk."""
    pasts, counts = [0, 3, CHUNK, 37, CHUNK - 1], [9, 13, 1, 1, 1]
    ids = [herds.tokens(past + count, seed) for seed, (past, count) in enumerate(zip(pasts, counts, strict=True))]
    sequences = [_started(runner, own[:past]) for own, past in zip(ids, pasts, strict=True)]
    steps = [Step(sequence, own[past:], range(count))
             for sequence, own, past, count in zip(sequences, ids, pasts, counts, strict=True)]
    together = runner.step(steps).copy()
    wanted = np.concatenate([_alone(runner, own)[past:] for own, past in zip(ids, pasts, strict=True)])
    np.testing.assert_array_equal(together, wanted)
    assert [len(sequence) for sequence in sequences] == [len(own) for own in ids]


def test_threads_do_not_matter(load: Load) -> None:
    ids = herds.tokens(100)
    one, two = (_append(load(case), load(case).new_sequence(), ids) for case in CASES[:2])
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("cuts", [[1, 2, 3, 30, 31, 69], [7] * 10, [64, 6], [70]], ids=str)
def test_any_split_of_a_prompt(runner: PagedRunner, cuts: list[int]) -> None:
    ids, sequence, found = herds.tokens(70), runner.new_sequence(), []
    while len(sequence) < 70:
        count = min(cuts[len(found) % len(cuts)], 70 - len(sequence))
        found.append(_append(runner, sequence, ids[len(sequence) : len(sequence) + count]))
    np.testing.assert_array_equal(np.concatenate(found), _alone(runner, ids))


def test_a_long_past_does_not_shorten_chunks(fp32: PagedRunner) -> None:
    assert fp32.chunk_len(1 << 24) == fp32.chunk_len(0) == fp32.longest_chunk


def test_rows_are_those_that_were_asked_for(fp32: PagedRunner) -> None:
    ids = herds.tokens(12)
    every, other = _alone(fp32, ids), herds.tokens(5, 1)
    found = fp32.step([Step(fp32.new_sequence(), ids, [2, 11]), Step(fp32.new_sequence(), other, []),
                       Step(fp32.new_sequence(), other, [4])])
    np.testing.assert_array_equal(found, [every[2], every[11], _alone(fp32, other)[4]])


def test_forks_share_their_past_and_nothing_else(runner: PagedRunner) -> None:
    ids, more = herds.tokens(40), [herds.tokens(30, seed) for seed in (1, 2)]
    sequence = _started(runner, ids)
    twin = sequence.fork()
    for step in range(30):
        found = runner.decode_batch([sequence, twin], [more[0][step], more[1][step]]).copy()
    for row, own in zip(found, more, strict=True):
        np.testing.assert_array_equal(row, _alone(runner, ids + own)[-1])


@pytest.mark.parametrize("lengths", [
    [20, 16, 10], [20, 10], [40, 39, 33, 32, 17], [CHUNK, CHUNK - 1], [33, 32, 31], [64, 16, 0], [70, 65, 64, 63],
], ids=str)
def test_what_was_forgotten_leaves_no_trace(runner: PagedRunner, lengths: list[int]) -> None:
    """Truncation within, to and over multiples of the attention chunk, and again; then the sequence goes on."""
    first, *others = lengths
    ids = herds.tokens(first)
    sequence = _started(runner, ids)
    for length in others:
        runner.truncate(sequence, length)
        assert list(sequence.token_ids) == ids[:length]
    more = herds.tokens(20, 5)
    wanted = _alone(runner, ids[: others[-1]] + more)[others[-1] :]
    np.testing.assert_array_equal(_append(runner, sequence, more), wanted)


def test_a_fork_of_what_was_truncated(fp32: PagedRunner) -> None:
    ids = herds.tokens(20)
    sequence = _started(fp32, ids)
    fp32.truncate(sequence, CHUNK)
    twin = sequence.fork()
    for each, length in ((sequence, 10), (twin, 12)):
        fp32.truncate(each, length)
        np.testing.assert_array_equal(fp32.decode(each, 7), _alone(fp32, [*ids[:length], 7])[-1])


def test_truncation_and_batches_do_not_disturb_each_other(fp32: PagedRunner) -> None:
    sequences = [_started(fp32, herds.tokens(30, seed)) for seed in range(3)]
    fp32.truncate(sequences[1], 18)
    found = fp32.decode_batch(sequences, [5, 6, 7]).copy()
    for seed, (row, token) in enumerate(zip(found, [5, 6, 7], strict=True)):
        past = herds.tokens(30, seed)[: 18 if seed == 1 else 30]
        np.testing.assert_array_equal(row, _alone(fp32, [*past, token])[-1])


def test_chunks_turn_over_at_different_steps(runner: PagedRunner) -> None:
    """Every sequence of a batch crosses a chunk while the others do not."""
    pasts = [CHUNK - 1, CHUNK - 3, 2 * CHUNK, 5]
    ids = [herds.tokens(past + 8, seed) for seed, past in enumerate(pasts)]
    sequences = [_started(runner, own[:past]) for own, past in zip(ids, pasts, strict=True)]
    for step in range(8):
        found = runner.decode_batch(sequences, [own[past + step] for own, past in zip(ids, pasts, strict=True)]).copy()
    for row, own in zip(found, ids, strict=True):
        np.testing.assert_array_equal(row, _alone(runner, own)[-1])


def _tight(runner: PagedRunner, blocks: int) -> PagedRunner:
    """The same graph with room for so many blocks of 64 tokens of all layers."""
    pools = runner.pools
    return PagedRunner(runner.graph, runner.config, cache_bytes=blocks * (pools.whole.cost + pools.chunked.cost))


def test_full_pools_refuse_and_change_nothing(fp32: PagedRunner) -> None:
    runner = _tight(fp32, 3)  # room for the first two steps, and not for all of the third
    full, small = _started(runner, herds.tokens(64)), _started(runner, herds.tokens(CHUNK, 1))
    used = runner.pools.budgets[0].used
    steps = [Step(full, [5], [0]), Step(small, [6], [0]), Step(runner.new_sequence(), [7], [0])]
    with pytest.raises(HerdError, match=r"^keys and values need [^\n]* end sequences, or load the engine with a larger "
                                        r"cache_bytes \(gpu_memory on a GPU\)$"):
        runner.step(steps)
    assert (len(full), len(small), runner.pools.budgets[0].used) == (64, CHUNK, used)
    with pytest.raises(HerdError, match="keys and values need"):
        runner.prefill(small, herds.tokens(400), np.zeros((0, 64), np.float32), all_positions=False)
    runner.truncate(small, CHUNK - 2)  # its last chunk is still there
    found = runner.decode_batch([full, small], [5, 6]).copy()
    for row, own in zip(found, ([*herds.tokens(64), 5], [*herds.tokens(CHUNK, 1)[:-2], 6]), strict=True):
        np.testing.assert_array_equal(row, _alone(fp32, own)[-1])


def test_sequences_that_are_gone_make_room(fp32: PagedRunner) -> None:
    runner = _tight(fp32, 1)
    for seed in range(3):
        np.testing.assert_array_equal(runner.decode(runner.new_sequence(), seed), _alone(fp32, [seed])[0])
    assert runner.pools.budgets[0].used == 0


def test_arrays_of_few_sizes_are_kept(fp32: PagedRunner) -> None:
    runner = _tight(fp32, 40)
    sequences = [_started(runner, [5]) for _ in range(KEPT_BINDINGS + 2)]
    for count in range(1, len(sequences) + 1):
        runner.decode_batch(sequences[:count], [5] * count)
    assert len(runner._kept) == KEPT_BINDINGS
    before: list[Any] = list(runner._kept.values())
    runner.decode_batch(sequences, [6] * len(sequences))
    assert list(runner._kept.values()) == before


def test_images_among_texts(tmp_path: Path) -> None:
    """Features belong to the sequence that brought them."""
    herds.save(TINY, tmp_path / "checkpoint")
    with open_checkpoint(tmp_path / "checkpoint") as checkpoint:
        build_bundle(checkpoint, tmp_path / "bundle")
    runner, image = Engine.load(tmp_path / "bundle", threads=1)._decoder, TINY.image_token_id
    assert isinstance(runner, PagedRunner)
    random, count = np.random.default_rng(0), 3
    features = [random.normal(size=(4, 64)).astype(np.float32) for _ in range(count)]
    prompts = [[7, *[image] * 4, *herds.tokens(3, seed)] for seed in range(count)]
    steps = [Step(runner.new_sequence(), prompt, [7], own) for prompt, own in zip(prompts, features, strict=True)]
    steps.insert(1, Step(runner.new_sequence(), herds.tokens(6), [5]))
    together = runner.step(steps).copy()
    alone = [runner.step([step._replace(sequence=runner.new_sequence())])[0].copy() for step in steps]
    np.testing.assert_array_equal(together, alone)
