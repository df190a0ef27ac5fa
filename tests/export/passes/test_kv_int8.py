"""QuantizeCaches: int8 buffers, close logits over chunk boundaries, alone and in a batch; refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from herdgraph.calibration.calibrate import calibrate
from herdgraph.calibration.windows import Data, Window
from herdgraph.errors import HerdError
from herdgraph.export.pipeline import build_bundle
from herdgraph.export.verify import fidelity
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.config.presets import TINY
from herdgraph.model.quantization.recipes import RECIPES
from herdgraph.runtimes import Engine
from support import herds

RECIPE = replace(RECIPES["fp32"], caches="int8")


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Engine]:
    directory = tmp_path_factory.mktemp("caches")
    herds.save(TINY, directory / "checkpoint")
    with open_checkpoint(directory / "checkpoint") as checkpoint:
        data = Data([Window(herds.tokens(200, seed)) for seed in (8, 9)], [])
        calibrate(checkpoint, directory / "calibration", data)
        build_bundle(checkpoint, directory / "exact", target="cpu-stock")
        build_bundle(checkpoint, directory / "int8", target="cpu-stock", recipe=RECIPE,
                     calibration=directory / "calibration")
    return Engine.load(directory / "exact", threads=1), Engine.load(directory / "int8", threads=1)


def test_buffers_take_a_quarter(engines: tuple[Engine, Engine]) -> None:
    exact, int8 = (engine.new_sequence().cache for engine in engines)
    assert int8.layers[0][0].dtype == np.int8
    assert 4 * int8.nbytes == exact.nbytes


def test_logits_are_close_and_decoding_is_prefilling(engines: tuple[Engine, Engine]) -> None:
    int8 = engines[1]
    ids = herds.tokens(60)
    wanted, found = (engine.prefill(engine.new_sequence(), ids, all_positions=True) for engine in engines)
    report = fidelity(wanted, found)
    assert 0 < report.mean_kl < 5e-3
    assert report.top1_agreement > 0.9
    sequence = int8.new_sequence()
    decoded = np.stack([int8.decode(sequence, token) for token in ids])
    # A prompt's own keys and values are exact while it attends, a token's are quantised first.
    assert fidelity(wanted, decoded).mean_kl < 5e-3


def test_a_prompt_in_pieces_keeps_the_codes_of_its_past(engines: tuple[Engine, Engine]) -> None:
    int8 = engines[1]
    sequence = int8.new_sequence()
    int8.prefill(sequence, herds.tokens(9))
    before = [key[:, :, :9].copy() for key, _ in sequence.cache.layers]
    int8.prefill(sequence, herds.tokens(5, 3))
    for codes, (key, _) in zip(before, sequence.cache.layers, strict=True):
        assert codes.any()
        np.testing.assert_array_equal(key[:, :, :9], codes)
        assert key[:, :, 9:14].any()
        assert not key[:, :, 14:].any()


def test_forks_truncation_and_batches(engines: tuple[Engine, Engine]) -> None:
    _, int8 = engines
    sequence, other = int8.new_sequence(), int8.new_sequence()
    int8.prefill(sequence, herds.tokens(300))
    twin = sequence.fork()
    int8.truncate(twin, 290)
    int8.prefill(other, herds.tokens(300)[:290])
    np.testing.assert_allclose(int8.decode(twin, 5), int8.decode(other, 5), atol=0.05)
    together = int8.decode_batch([sequence, twin], [7, 8])
    np.testing.assert_allclose(together[1], int8.decode(other, 8), atol=0.05)


def test_calibration_is_needed(tmp_path: Path) -> None:
    herds.save(TINY, tmp_path / "checkpoint")
    with (
        open_checkpoint(tmp_path / "checkpoint") as checkpoint,
        pytest.raises(HerdError, match=r"8-bit keys and values need .* pass --calibration DIRECTORY"),
    ):
        build_bundle(checkpoint, tmp_path / "bundle", target="cpu-stock", recipe=RECIPE)
    assert not (tmp_path / "bundle").exists()
