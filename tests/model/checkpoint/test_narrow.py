"""Ranges of lazily read tensors: the values of the whole, and no byte of what was not asked for."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from herdgraph.errors import HerdError
from herdgraph.model.checkpoint.quantized import Scaled
from herdgraph.model.checkpoint.tensors.lazy import FileTensor, LazyTensor, MappedTensor
from herdgraph.model.checkpoint.tensors.narrow import narrowed, parts_of
from herdgraph.model.checkpoint.tensors.views import Concat, Converted, Reshaped, Rows, Stack, Transposed, Unflatten


def _file(path: Path, shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> FileTensor:
    """A tensor of a file behind 12 other bytes."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    path.write_bytes(bytes(12) + values.flatten().view(torch.uint8).numpy().tobytes())
    return FileTensor(path, 12, shape, dtype)


def _mapped(path: Path, shape: tuple[int, ...]) -> MappedTensor:
    torch.save(torch.randn(shape), path)
    return MappedTensor(torch.load(path, mmap=True))


VIEWS: dict[str, Callable[[Path], LazyTensor]] = {
    "file": lambda d: _file(d / "a", (4, 6, 8)),
    "bfloat16": lambda d: _file(d / "a", (4, 6, 8), dtype=torch.bfloat16),
    "mapped": lambda d: _mapped(d / "a", (4, 6, 8)),
    "transposed": lambda d: Transposed(_file(d / "a", (8, 6))),
    "rows": lambda d: Rows(_file(d / "a", (9, 6, 8)), 3, 7),
    "unflatten": lambda d: Unflatten(_file(d / "a", (24, 8)), 4),
    "concat": lambda d: Concat([_file(d / "a", (4, 6, 3)), _file(d / "b", (4, 6, 5), 1)], 2),
    "stack": lambda d: Stack([Transposed(_file(d / name, (8, 6), seed)) for seed, name in enumerate("abcd")]),
    "scaled": lambda d: Scaled(_file(d / "a", (4, 6, 8)), Reshaped(_file(d / "b", (8,), 1), (1, 1, 8))),
    "scaled rows": lambda d: Scaled(_file(d / "a", (4, 6)), Reshaped(_file(d / "b", (4,), 1), (4, 1))),
    "converted": lambda d: Converted(_file(d / "a", (4, 6)), lambda value: value + 1, (4, 6)),
}


@pytest.mark.parametrize("view", VIEWS)
def test_narrowed_values(view: str, tmp_path: Path) -> None:
    whole = VIEWS[view](tmp_path)
    values = whole.read()

    @settings(max_examples=40, deadline=None)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        part, expected = whole, values
        for axis, size in enumerate(whole.shape):
            begin = data.draw(st.integers(0, size - 1))
            end = data.draw(st.integers(begin + 1, size))
            part, expected = narrowed(part, axis, range(begin, end)), expected.narrow(axis, begin, end - begin)
        if len(part.shape) > 1 and part.shape[1] > 1:  # and a range of a range
            part, expected = narrowed(part, 1, range(1, part.shape[1])), expected[:, 1:]
        assert part.shape == expected.shape
        assert part.dtype == whole.dtype
        assert torch.equal(part.read(), expected)
        index = data.draw(st.integers(0, part.shape[0] - 1))
        assert torch.equal(part.read(index), expected[index])
        assert torch.equal(part.read(slice(index, None)), expected[index:])

    check()


def test_parts_of_several_ranges(tmp_path: Path) -> None:
    whole = _file(tmp_path / "a", (4, 3, 8))
    part = parts_of(whole, {0: (range(1, 3),), 2: (range(2), range(4, 6))})
    assert torch.equal(part.read(), whole.read()[1:3][..., [0, 1, 4, 5]])
    assert torch.equal(part.read(1), whole.read()[2][..., [0, 1, 4, 5]])


def test_file_box_reads_only_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, read, real = _file(tmp_path / "a", (4, 6, 8)), [], os.preadv

    def counted(file: int, buffers: list[Any], offset: int) -> int:
        read.append((offset, sum(map(len, buffers))))
        return real(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    box = narrowed(narrowed(whole, 0, range(1, 3)), 1, range(2, 4))
    box.read()
    at = [12 + 4 * 8 * (6 * row + 2) for row in (1, 2)]
    assert read == [(at[0], 2 * 8 * 4), (at[1], 2 * 8 * 4)], "one run for each entry of the first axis"
    read.clear()
    narrowed(box, 2, range(3)).read(1)
    assert read == [(at[1], 12), (at[1] + 32, 12)]


def test_file_box_of_shortened_file(tmp_path: Path) -> None:
    part = narrowed(_file(tmp_path / "a", (4, 6)), 1, range(2, 4))
    (tmp_path / "a").write_bytes(bytes(30))
    with pytest.raises(HerdError, match="became shorter while it was read"):
        part.read()
