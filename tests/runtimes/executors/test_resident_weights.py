"""Packed weights: copied into memory of our own, in huge pages where there are any."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from herdgraph.errors import HerdError
from herdgraph.export.pipeline import build_bundle
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.config.presets import TINY
from herdgraph.runtimes import Engine
from herdgraph.runtimes.bundle.blocks import BLOCK
from herdgraph.runtimes.executors.ort.paged import PagedRunner
from herdgraph.runtimes.executors.ort.weights import KEY, ResidentWeights, copy_in_parts
from support import herds

SIZE = 2 * BLOCK + 1000
WEIGHTS = "herdgraph.runtimes.executors.ort.weights"
PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "decoder.data"
    path.write_bytes(np.random.default_rng(0).integers(0, 256, SIZE, np.uint8).tobytes())
    return path


def _session(**places: tuple[int, tuple[int, ...]]) -> Any:
    """A session of a graph that says where its weights lie."""
    said = {name: [offset, int(np.prod(shape))] for name, (offset, shape) in places.items()}
    return SimpleNamespace(
        get_modelmeta=lambda: SimpleNamespace(custom_metadata_map={KEY: json.dumps(said)}),
        get_overridable_initializers=lambda: [SimpleNamespace(name=name, shape=list(shape))
                                              for name, (_, shape) in places.items()])


def _resident(data: Path) -> ResidentWeights:
    return [*copy_in_parts(data)][-1]


def test_initializers_are_the_files_bytes(data: Path) -> None:
    found = _resident(data).values(_session(a=(0, (64,)), b=(BLOCK - 6, (3, 4))))
    whole = np.frombuffer(data.read_bytes(), np.uint8)
    np.testing.assert_array_equal(found["a"].numpy(), whole[:64])
    np.testing.assert_array_equal(found["b"].numpy(), whole[BLOCK - 6 : BLOCK + 6].reshape(3, 4))


def test_of_an_unfinished_copy_there_is_what_lies_in_it_whole(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{WEIGHTS}.PART", BLOCK)
    session = _session(a=(0, (64,)), b=(BLOCK - 6, (3, 4)), c=(2 * BLOCK, (1000,)))
    assert [sorted(weights.values(session)) for weights in copy_in_parts(data)] == [["a"], ["a", "b"], ["a", "b", "c"]]


def test_a_file_that_becomes_shorter_ends_the_copy(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{WEIGHTS}.PART", BLOCK)
    parts = copy_in_parts(data)
    next(parts)
    os.truncate(data, BLOCK + 10)
    assert [*parts] == []


@pytest.mark.parametrize("place", [(SIZE - 3, (4,)), (-1, (4,)), (1 << 60, (4,))])
def test_what_lies_outside_of_the_file_is_refused(data: Path, place: tuple[int, tuple[int, ...]]) -> None:
    with pytest.raises(HerdError, match="has no 'a' where the graph says: rebuild the bundle"):
        _resident(data).values(_session(a=place))


def test_memory_is_of_huge_pages(tmp_path: Path) -> None:
    if not PAGES.exists() or "[never]" in PAGES.read_text():
        pytest.skip("this machine gives none to those who ask")
    path = tmp_path / "decoder.data"
    path.write_bytes(bytes(8 << 20))
    weights = _resident(path)
    address = weights._bytes.ctypes.data
    assert address % (2 << 20) == 0
    for area in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        first, end = (int(number, 16) for number in area.split(" ", 1)[0].split("-"))
        if first <= address < end:
            assert int(re.findall(r"AnonHugePages: +(\d+)", area)[0]) >= 4 << 10


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("resident")
    herds.save(TINY, directory / "checkpoint")
    with open_checkpoint(directory / "checkpoint") as checkpoint:
        build_bundle(checkpoint, directory / "bundle", recipe="int8")
    return directory / "bundle"


@pytest.mark.parametrize("role", ["decoder", "vision"])
def test_altered_weights_are_refused_before_a_call(bundle: Path, role: str, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "altered")
    with (tmp_path / f"altered/{role}.data").open("r+b") as file:
        file.write(bytes(64))
    with pytest.raises(HerdError, match=rf"{role}\.data was altered: blake3 of block 0 is .* rebuild the bundle"):
        Engine.load(tmp_path / "altered", threads=1)


def test_an_engine_that_goes_over_to_the_copy_says_the_same(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("herdgraph.runtimes.executors.ort.paged.SMALL", 0)
    with Engine.load(bundle, threads=1, memory="low") as mapped, Engine.load(
            bundle, threads=1) as copied:
        runner = copied._decoder
        assert isinstance(runner, PagedRunner)
        assert runner._copying is not None
        assert runner._copying.is_alive()  # until the first call has its result
        first = copied.prefill(copied.new_sequence(), [3, 4, 5])
        runner._copying.join()
        assert runner.graph._weights  # type: ignore[attr-defined]
        wanted = mapped.prefill(mapped.new_sequence(), [3, 4, 5])
        for found in (first, copied.prefill(copied.new_sequence(), [3, 4, 5])):
            np.testing.assert_array_equal(found, wanted)


def test_a_copy_that_fails_leaves_the_mapping(
    data: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No memory for a copy is no error: nothing is printed, and calls go on as before."""
    def refuse(*_: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr("herdgraph.runtimes.executors.ort.paged.copy_in_parts", refuse)
    caplog.set_level("INFO", logger="herdgraph")
    runner = PagedRunner.__new__(PagedRunner)
    runner._stopped, runner._called = Event(), Event()
    runner._called.set()
    runner._copy(data)
    assert "is used as it is mapped: no room" in caplog.text
