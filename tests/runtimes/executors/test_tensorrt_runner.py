"""The host's part of running plans, on a stand-in that runs the plan's float32 twin: logits of the cpu engine."""

from __future__ import annotations

from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from herdgraph.errors import HerdError
from herdgraph.export.graph.capture import bind_weights, capture_decoder
from herdgraph.export.passes import LowerExpertsDense, LowerExpertsGathered, LowerExpertsUnrolled
from herdgraph.export.pipeline import build_bundle
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.config import HerdConfig
from herdgraph.model.config.presets import TINY
from herdgraph.runtimes import Engine, Sequence
from herdgraph.runtimes.executors.tensorrt import Limits, PlanRunner, choose_profile
from support import herds, plans
from support.plan_twin import DECODE, PREFILL, Twin


def _pair(
    config: HerdConfig, directory: Path, profiles: Items[Limits] = (DECODE, PREFILL), **options: Any
) -> tuple[Engine, Engine, Twin]:
    """The cpu engine of a checkpoint, and one over the twin of its plan."""
    herds.save(config, directory / "checkpoint")
    with open_checkpoint(directory / "checkpoint") as checkpoint:
        build_bundle(checkpoint, directory / "bundle", target="cpu-stock")
        model = capture_decoder(config)
        bind_weights(model, checkpoint)
        plans.lower(model, config, **options)
        twin = Twin(model, profiles, dtype=np.uint8 if options.get("fp8_caches") else np.float32)
    cpu = Engine.load(directory / "bundle", threads=1)
    return cpu, Engine(cpu.bundle, PlanRunner(twin, config), cpu._vision), twin


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Engine, Twin]:
    return _pair(herds.variant(), tmp_path_factory.mktemp("twin"))


def _close(found: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize(("name", "experts"), [
    ("moe-every-layer", LowerExpertsDense), ("chunk-5", LowerExpertsGathered), ("top-2", LowerExpertsUnrolled),
    ("top-2", LowerExpertsGathered), ("128-experts", LowerExpertsUnrolled), ("no-chunks", LowerExpertsDense),
    ("temperature-floor-3", LowerExpertsDense), ("gqa-5", LowerExpertsDense), ("tied", LowerExpertsDense),
    ("dense", LowerExpertsDense),
])
def test_logits_of_the_cpu_engine(name: str, experts: type, tmp_path: Path) -> None:
    cpu, plan, _ = _pair(herds.VARIANTS[name], tmp_path, experts=experts)
    ids = herds.tokens(60)
    ours, theirs = plan.new_sequence(), cpu.new_sequence()
    _close(plan.prefill(ours, ids, all_positions=True), cpu.prefill(theirs, ids, all_positions=True))
    for token in herds.tokens(12, seed=1):
        _close(plan.decode(ours, token), cpu.decode(theirs, token))


def test_images(tmp_path: Path) -> None:
    cpu, plan, twin = _pair(TINY, tmp_path)
    image = [TINY.image_token_id] * TINY.vision.tokens_per_tile
    ids = [*herds.tokens(9), *image, *herds.tokens(5, seed=1), *image, *herds.tokens(7, seed=2)]
    pixels = np.random.default_rng(0).normal(size=(2, 3, 28, 28)).astype(np.float32)
    ours, theirs = plan.new_sequence(), cpu.new_sequence()
    _close(plan.prefill(ours, ids, pixels, all_positions=True), cpu.prefill(theirs, ids, pixels, all_positions=True))
    _close(plan.decode(ours, 7), cpu.decode(theirs, 7))
    assert [len(call.inputs["image_features"]) for call in twin.calls] == [4, 4, 0]


def test_prefill_chunks_and_profiles(tiny: tuple[Engine, Engine, Twin]) -> None:
    """Prefill chunks end at attention chunks and limits; single tokens take the decode profile."""
    _, plan, twin = tiny
    twin.calls.clear()
    sequence = plan.new_sequence()
    plan.prefill(sequence, herds.tokens(5))
    plan.prefill(sequence, herds.tokens(30))
    plan.decode(sequence, 3)
    assert [call.inputs["input_ids"].shape[1] for call in twin.calls] == [5, 11, 16, 3, 1]
    assert [call.profile for call in twin.calls] == [1, 1, 1, 1, 0]
    assert [call.first_slots[0] for call in twin.calls] == [[0], [5], [0], [0], [3]], "chunked layers start again"
    assert [call.first_slots[3] for call in twin.calls] == [[0], [5], [16], [32], [35]]


def test_caches_grow(tiny: tuple[Engine, Engine, Twin]) -> None:
    cpu, plan, twin = tiny
    ids = herds.tokens(300)
    ours, theirs = plan.new_sequence(), cpu.new_sequence()
    plan.prefill(ours, ids[:250])
    cpu.prefill(theirs, ids[:250])
    twin.calls.clear()
    for token in ids[250:260]:
        _close(plan.decode(ours, token), cpu.decode(theirs, token))
    assert [call.caches[3][0].shape[2] for call in twin.calls] == [256] * 6 + [512] * 4
    assert {call.caches[0][0].shape[2] for call in twin.calls} == {16}


def _sequences(engine: Engine, lengths: list[int]) -> list[Sequence]:
    sequences = [engine.new_sequence() for _ in lengths]
    for seed, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
        engine.prefill(sequence, herds.tokens(length, seed))
    return sequences


def test_batches_of_different_lengths(tiny: tuple[Engine, Engine, Twin]) -> None:
    cpu, plan, twin = tiny
    lengths = [3, 40, 15, 16, 1]
    ours, theirs = _sequences(plan, lengths), _sequences(cpu, lengths)
    twin.calls.clear()
    for step in range(18):
        tokens = herds.tokens(5, 100 + step)
        _close(plan.decode_batch(ours, tokens), cpu.decode_batch(theirs, tokens))
    assert twin.calls[0].caches[0][0] is twin.calls[-1].caches[0][0], "the same batch moves nothing"
    _close(plan.prefill(ours[2], herds.tokens(20, 7)), cpu.prefill(theirs[2], herds.tokens(20, 7)))
    pair = [ours[4], ours[2]], [theirs[4], theirs[2]]
    _close(plan.decode_batch(pair[0], [5, 6]), cpu.decode_batch(pair[1], [5, 6]))


def test_forks_and_truncation(tiny: tuple[Engine, Engine, Twin]) -> None:
    cpu, plan, _ = tiny
    (ours,), (theirs,) = _sequences(plan, [50]), _sequences(cpu, [50])
    twin_sequence = ours.fork()
    plan.prefill(twin_sequence, herds.tokens(9, 3))
    plan.truncate(ours, 37)
    cpu.truncate(theirs, 37)
    _close(plan.prefill(ours, herds.tokens(5, 4)), cpu.prefill(theirs, herds.tokens(5, 4)))


def test_fp8_products_and_caches_stay_near(tmp_path: Path) -> None:
    cpu, plan, _ = _pair(herds.variant(), tmp_path, fp8=True, fp8_caches=True)
    ours, theirs = plan.new_sequence(), cpu.new_sequence()
    assert ours.cache.nbytes * 4 == theirs.cache.nbytes
    ids = herds.tokens(40)
    found, wanted = (engine.prefill(sequence, ids, all_positions=True)
                     for engine, sequence in ((plan, ours), (cpu, theirs)))
    assert 1e-3 < np.abs(found - wanted).mean() < 0.25 * np.abs(wanted).mean()
    again = plan.new_sequence()
    plan.prefill(again, ids[:-1])
    _close(plan.decode(again, ids[-1]), found[-1])


def test_what_a_plan_was_not_built_for(tiny: tuple[Engine, Engine, Twin]) -> None:
    _, plan, twin = tiny
    sequence = plan.new_sequence()
    with pytest.raises(HerdError, match="513 tokens are more than the 512 that the plan was built for"):
        plan.prefill(sequence, herds.tokens(513))
    assert len(sequence) == 0
    with pytest.raises(HerdError, match="batch is 9, the plan was built for 1 to 8: build it with other limits"):
        plan.decode_batch(_sequences(plan, [1] * 9), [5] * 9)
    with pytest.raises(HerdError, match="chunked layers need 16 slots, the plan was built for 8"):
        PlanRunner(twin.with_profiles([DECODE | {"slots_local": (1, 8)}]), plan.config)


def test_a_context_shorter_than_a_chunk(tmp_path: Path) -> None:
    """Chunked layers then need no more slots than the context, whatever power of two their buffers would grow to."""
    config = herds.variant(attention_chunk_size=1024)
    limits = [profile | {"slots_local": (1, 300), "slots_global": (1, 300)} for profile in (DECODE, PREFILL)]
    cpu, short, _ = _pair(config, tmp_path, limits)
    ours, theirs = short.new_sequence(), cpu.new_sequence()
    _close(short.prefill(ours, herds.tokens(300)), cpu.prefill(theirs, herds.tokens(300)))
    assert {key.shape[2] for key, _ in ours.cache.layers} == {300}
    with pytest.raises(HerdError, match="301 tokens are more than the 300"):
        short.decode(ours, 5)


def test_the_first_profile_that_fits() -> None:
    profiles = [{"tokens": (1, 1), "batch": (1, 8)}, {"tokens": (1, 64), "batch": (1, 2)}]
    assert choose_profile(profiles, {"tokens": 1, "batch": 8}) == 0
    assert choose_profile(profiles, {"tokens": 2, "batch": 2, "rows": 99}) == 1
    with pytest.raises(HerdError, match="tokens is 65, the plan was built for 1 to 64"):
        choose_profile(profiles, {"tokens": 65, "batch": 2})
    with pytest.raises(HerdError, match="no profile of the plan takes tokens 2, batch 8 together"):
        choose_profile(profiles, {"tokens": 2, "batch": 8})
