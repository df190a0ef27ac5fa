"""Packed weights in memory of our own: the file's bytes, each block checked, in huge pages where there are any."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from herdgraph.errors import HerdError
from herdgraph.runtimes.bundle.blocks import BLOCK, write_block_hashes
from herdgraph.runtimes.executors.ort.weights import KEY, ResidentWeights

SIZE = 2 * BLOCK + 1000
PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "decoder.data"
    path.write_bytes(np.random.default_rng(0).integers(0, 256, SIZE, np.uint8).tobytes())
    write_block_hashes(path)
    return path


def _session(**places: tuple[int, tuple[int, ...]]) -> Any:
    """A session of a graph that says where its weights lie."""
    said = {name: [offset, int(np.prod(shape))] for name, (offset, shape) in places.items()}
    return SimpleNamespace(
        get_modelmeta=lambda: SimpleNamespace(custom_metadata_map={KEY: json.dumps(said)}),
        get_overridable_initializers=lambda: [SimpleNamespace(name=name, shape=list(shape))
                                              for name, (_, shape) in places.items()])


@pytest.mark.parametrize("verify", [True, False])
def test_initializers_are_the_files_bytes(data: Path, verify: bool) -> None:
    found = ResidentWeights(data, 2, verify=verify).values(_session(a=(0, (64,)), b=(BLOCK - 6, (3, 4))))
    whole = np.frombuffer(data.read_bytes(), np.uint8)
    np.testing.assert_array_equal(found["a"].numpy(), whole[:64])
    np.testing.assert_array_equal(found["b"].numpy(), whole[BLOCK - 6 : BLOCK + 6].reshape(3, 4))


@pytest.mark.parametrize("block", [0, 1, 2])
def test_an_altered_block_is_named(data: Path, block: int) -> None:
    with data.open("r+b") as file:
        file.seek(block * BLOCK + 7)
        byte = file.read(1)[0]
        file.seek(block * BLOCK + 7)
        file.write(bytes([byte ^ 1]))
    ResidentWeights(data, 1, verify=False)
    with pytest.raises(HerdError, match=rf"decoder\.data was altered: SHA-256 of block {block} is"):
        ResidentWeights(data, 1, verify=True)


@pytest.mark.parametrize("place", [(SIZE - 3, (4,)), (-1, (4,)), (1 << 60, (4,))])
def test_what_lies_outside_of_the_file_is_refused(data: Path, place: tuple[int, tuple[int, ...]]) -> None:
    with pytest.raises(HerdError, match="has no 'a' where the graph says: rebuild the bundle"):
        ResidentWeights(data, 1, verify=False).values(_session(a=place))


def test_memory_is_of_huge_pages(tmp_path: Path) -> None:
    if not PAGES.exists() or "[never]" in PAGES.read_text():
        pytest.skip("this machine gives none to those who ask")
    path = tmp_path / "decoder.data"
    path.write_bytes(bytes(8 << 20))
    weights = ResidentWeights(path, 1, verify=False)
    address = weights._bytes.ctypes.data
    assert address % (2 << 20) == 0
    for area in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        first, end = (int(number, 16) for number in area.split(" ", 1)[0].split("-"))
        if first <= address < end:
            assert int(re.findall(r"AnonHugePages: +(\d+)", area)[0]) >= 4 << 10
