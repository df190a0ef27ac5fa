"""Block hashes: what was read is checked before its result goes out, what was not is left alone."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from herdgraph.errors import HerdError
from herdgraph.runtimes.bundle import blocks
from herdgraph.runtimes.bundle.blocks import (
    BLOCK,
    BlockHashes,
    _BlockCheck,
    block_check,
    check_all_blocks,
    write_block_hashes,
)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two whole blocks and the beginning of a third."""
    path = tmp_path / "decoder.data"
    path.write_bytes(b"a" * BLOCK + b"b" * BLOCK + b"c" * 1000)
    write_block_hashes(path)
    return path


def _hashes(path: Path) -> BlockHashes:
    return BlockHashes(path, "blake3")


def _flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(b"X")


@pytest.mark.parametrize("threads", [1, 2, None])
def test_what_was_not_altered_passes(data: Path, threads: int | None) -> None:
    check_all_blocks([_hashes(data)], threads)


@pytest.mark.parametrize("block", [0, 1, 2])
def test_all_blocks_are_compared(block: int, data: Path) -> None:
    _flip(data, block * BLOCK + 999)
    with pytest.raises(HerdError, match=f"decoder.data was altered: blake3 of block {block} is"):
        check_all_blocks([_hashes(data)], 2)


def test_sha256_of_format_2_is_compared_as_well(data: Path) -> None:
    content = data.read_bytes()
    lines = [hashlib.sha256(content[at : at + BLOCK]).hexdigest() for at in range(0, len(content), BLOCK)]
    data.with_name("decoder.data.sha256").write_text("\n".join(lines))
    check_all_blocks([BlockHashes(data, "sha256")], 1)
    _flip(data, BLOCK)
    with pytest.raises(HerdError, match="sha256 of block 1 is"):
        check_all_blocks([BlockHashes(data, "sha256")], 1)


@pytest.mark.parametrize("block", [0, 1, 2])
def test_altered_blocks_are_found(block: int, data: Path) -> None:
    block_check([_hashes(data)])()
    _flip(data, block * BLOCK + 999)
    with pytest.raises(HerdError, match=f"decoder.data was altered: blake3 of block {block} is"):
        block_check([_hashes(data)])()


def test_only_what_was_read_is_checked(data: Path) -> None:
    with data.open("r+b") as file:
        file.truncate(12 * BLOCK)  # the system reads some blocks ahead
    write_block_hashes(data)
    _flip(data, 0)
    _drop_from_page_cache(data)
    check = _BlockCheck(_hashes(data))
    if check._resident().any():
        pytest.skip("this file system keeps its files in memory")
    assert check._pages[8 * BLOCK + BLOCK // 2] == 0
    check()
    assert check._unchecked[0]
    assert not check._unchecked[8]
    assert check._pages[5] == ord("a")
    with pytest.raises(HerdError, match="block 0"):
        check()


def _drop_from_page_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_a_call_without_page_faults_costs_nothing(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faults, calls = [7], []
    monkeypatch.setattr(blocks, "_page_faults", lambda: lambda: faults[0])
    monkeypatch.setattr(_BlockCheck, "__call__", lambda _: calls.append(1))
    check = block_check([_hashes(data)])
    for wanted, count in ((1, 7), (1, 7), (2, 8)):
        faults[0] = count
        check()
        assert len(calls) == wanted


def test_hashes_have_to_be_there(data: Path) -> None:
    hashes = data.with_name("decoder.data.blake3")
    hashes.write_text(hashes.read_text()[:65])
    with pytest.raises(HerdError, match="has 1 hashes for 3 blocks"):
        block_check([_hashes(data)])
    hashes.unlink()
    with pytest.raises(HerdError, match="has no block hashes beside it, by which it is checked"):
        block_check([_hashes(data)])
