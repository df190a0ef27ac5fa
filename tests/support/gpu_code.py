"""A small ELF library with code for GPUs of several kinds, as a CUDA compiler lays it out."""

from __future__ import annotations

import struct

MAGIC, PTX, MACHINE_CODE = 0xBA55ED50, 1, 2


def entry(sm: int, code: bytes, kind: int = MACHINE_CODE) -> bytes:
    """Code for one architecture."""
    header = struct.pack("<HHIQ", kind, 257, 64, len(code)) + bytes(12) + struct.pack("<I", sm)
    return header.ljust(64, b"\0") + code


def container(*entries: bytes) -> bytes:
    """Several of them."""
    body = b"".join(entries)
    return struct.pack("<IHHQ", MAGIC, 1, 16, len(body)) + body


def library(code: bytes) -> bytearray:
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


CODE = (container(entry(80, b"a" * 24), entry(90, b"b" * 40), entry(90, b"p" * 8, kind=PTX)) + bytes(8)
        + container(entry(75, b"c" * 16)) + container(entry(90, b"d" * 32)))
