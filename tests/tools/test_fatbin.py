"""GPU code in a library: found by architecture, and removed without moving anything else."""

from __future__ import annotations

import struct

import fatbin
import pytest


def _entry(sm: int, code: bytes, kind: int = fatbin.MACHINE_CODE) -> bytes:
    header = struct.pack("<HHIQ", kind, 257, 64, len(code)) + bytes(12) + struct.pack("<I", sm)
    return header.ljust(64, b"\0") + code


def _container(*entries: bytes) -> bytes:
    body = b"".join(entries)
    return struct.pack("<IHHQ", fatbin.MAGIC, 1, 16, len(body)) + body


def _library(code: bytes) -> bytearray:
    """An ELF file with three sections: nothing, names, GPU code."""
    names = b"\0.shstrtab\0.nv_fatbin\0"
    begin = 64 + len(names)
    table = begin + len(code)
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header += struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 0, table, 0, 64, 0, 0, 64, 3, 1)
    sections = [bytes(64)]
    for name, place, size in ((1, 64, len(names)), (11, begin, len(code))):
        sections.append(struct.pack("<IIQQQQ", name, 1, 0, 0, place, size).ljust(64, b"\0"))
    return bytearray(header + names + code + b"".join(sections))


CODE = (_container(_entry(80, b"a" * 24), _entry(90, b"b" * 40), _entry(90, b"p" * 8, kind=1)) + bytes(8)
        + _container(_entry(75, b"c" * 16)) + _container(_entry(90, b"d" * 32)))


def test_contents_by_architecture() -> None:
    assert fatbin.contents(_library(CODE)) == {
        ("PTX", 90): (1, 72), ("SM", 75): (1, 80), ("SM", 80): (1, 88), ("SM", 90): (2, 200)}


def test_one_architecture_is_kept_in_place() -> None:
    library = _library(CODE)
    size = len(library)
    fatbin.keep(library, {90})
    assert len(library) == size
    assert fatbin.contents(library) == {("SM", 90): (2, 200)}
    assert library.count(b"b" * 40) == library.count(b"d" * 32) == 1
    assert b"a" * 24 not in library
    assert b"c" * 16 not in library


def test_other_files_are_refused() -> None:
    with pytest.raises(ValueError, match="no 64-bit"):
        fatbin.section(b"MZ" + bytes(100))
    with pytest.raises(ValueError, match=r"no section \.text"):
        fatbin.section(_library(CODE), ".text")
