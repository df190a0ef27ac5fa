"""GPU code inside of a shared library (ELF section ``.nv_fatbin``): what there is for which architecture, and a copy
that keeps one of them, which a machine without network gets sent.

    python tools/fatbin.py LIBRARY

The section is a row of containers; each has a header, then entries: a header and code for one architecture.

    container  magic u32, version u16, header bytes u16, body bytes u64, entries
    entry      kind u16 (1 PTX, 2 machine code), version u16, header bytes u32, code bytes u64; architecture u32 at 28
"""

from __future__ import annotations

import struct
import sys
from collections import Counter
from collections.abc import Container, Iterator
from pathlib import Path
from typing import NamedTuple

MAGIC = 0xBA55ED50
MACHINE_CODE = 2
_ALIGNMENT = 8


class Entry(NamedTuple):
    """Code for one architecture.

    Attributes:
        begin: offset in the file.
        size: bytes, the header included.
        kind: 1 for PTX, 2 for machine code.
        sm: architecture, for example 90.
    """

    begin: int
    size: int
    kind: int
    sm: int


class Body(NamedTuple):
    """A container's entries, and where they lie.

    Attributes:
        header: offset of the container.
        begin: offset of the first entry.
        size: bytes of all entries.
        entries: in order.
    """

    header: int
    begin: int
    size: int
    entries: tuple[Entry, ...]


def section(data: bytes | bytearray, name: str = ".nv_fatbin") -> tuple[int, int]:
    """Offset and size of a section of a 64-bit little-endian ELF file; ``ValueError`` when there is none."""
    if data[:6] != b"\x7fELF\x02\x01":
        raise ValueError("no 64-bit little-endian ELF file")
    (table,) = struct.unpack_from("<Q", data, 40)
    size, count, names = struct.unpack_from("<HHH", data, 58)
    headers = [struct.unpack_from("<IIQQQQ", data, table + index * size) for index in range(count)]
    strings = headers[names][4]
    for header in headers:
        begin = strings + header[0]
        if data[begin : data.index(b"\0", begin)] == name.encode():
            return header[4], header[5]
    raise ValueError(f"no section {name}")


def bodies(data: bytes | bytearray, begin: int, size: int) -> Iterator[Body]:
    """The containers of a section."""
    place, end = begin, begin + size
    while place + 16 <= end:
        magic, _, header, length = struct.unpack_from("<IHHQ", data, place)
        if magic != MAGIC:
            place += _ALIGNMENT
            continue
        yield Body(place, place + header, length, tuple(_entries(data, place + header, length)))
        place += header + length


def _entries(data: bytes | bytearray, begin: int, size: int) -> Iterator[Entry]:
    place = begin
    while place < begin + size:
        kind, _, header, code = struct.unpack_from("<HHIQ", data, place)
        (sm,) = struct.unpack_from("<I", data, place + 28)
        yield Entry(place, header + code, kind, sm)
        place += header + code


def keep(data: bytearray, architectures: Container[int]) -> None:
    """Remove all but the machine code for some architectures; nothing moves, what is free becomes zeros."""
    for body in list(bodies(data, *section(data))):
        kept = b"".join(data[entry.begin : entry.begin + entry.size] for entry in body.entries
                        if entry.kind == MACHINE_CODE and entry.sm in architectures)
        data[body.begin : body.begin + body.size] = kept + bytes(body.size - len(kept))
        struct.pack_into("<Q", data, body.header + 8, len(kept))


def contents(data: bytes | bytearray) -> dict[tuple[str, int], tuple[int, int]]:
    """Number and bytes of entries by kind and architecture."""
    count: Counter[tuple[str, int]] = Counter()
    total: Counter[tuple[str, int]] = Counter()
    for body in bodies(data, *section(data)):
        for entry in body.entries:
            key = "PTX" if entry.kind == 1 else "SM", entry.sm
            count[key] += 1
            total[key] += entry.size
    return {key: (count[key], total[key]) for key in sorted(count)}


if __name__ == "__main__":
    for (kind, sm), (number, size) in contents(Path(sys.argv[1]).read_bytes()).items():
        print(f"{kind} {sm}: {number} entries, {size / 2**20:.1f} MiB")
