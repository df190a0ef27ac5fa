"""GPU code in a library: found by architecture, and removed without moving anything else."""

from __future__ import annotations

import fatbin
import pytest

from support.gpu_code import CODE, library


def test_contents_by_architecture() -> None:
    assert fatbin.contents(library(CODE)) == {
        ("PTX", 90): (1, 72), ("SM", 75): (1, 80), ("SM", 80): (1, 88), ("SM", 90): (2, 200)}


def test_one_architecture_is_kept_in_place() -> None:
    data = library(CODE)
    size = len(data)
    fatbin.keep(data, {90})
    assert len(data) == size
    assert fatbin.contents(data) == {("SM", 90): (2, 200)}
    assert data.count(b"b" * 40) == data.count(b"d" * 32) == 1
    assert b"a" * 24 not in data
    assert b"c" * 16 not in data


def test_other_files_are_refused() -> None:
    with pytest.raises(ValueError, match="no 64-bit"):
        fatbin.section(b"MZ" + bytes(100))
    with pytest.raises(ValueError, match=r"no section \.text"):
        fatbin.section(library(CODE), ".text")
