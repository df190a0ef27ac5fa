"""Seeded damage: to bytes, to JSON, to files. The same generator state gives the same damage."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    7,
    2**31,
    2**63,
    -(2**63),
    10**30,
    0.5,
    -0.5,
    1e308,
    5e-324,
    "",
    "x",
    "a\x00b",
    "\ud800",
    "../../etc/passwd",
    "/etc/passwd",
    "\x1b[31mred",
    "ä" * 50,
    "9" * 5000,
    [],
    {},
    [1],
    [[1]],
    [None],
    {"a": 1},
    [{}],
    ["x"] * 20,
    list(range(300)),
    "<|eot|>",
    "\ue000\uf8ff",
)
RAW_JSON = ("NaN", "Infinity", "-Infinity", "1e999", "1" * 6000, "[" * 20_000, '{"a":1,"a":2}', "", "null", "\xff", "{")


LARGE = 64 << 20
"""Files above are holes that an earlier damage made."""


def damaged_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip, cut, insert, repeat, swap or overwrite some bytes."""
    kind = rng.randrange(8)
    at = rng.randrange(len(data) + 1)
    some = bytes(rng.randrange(256) for _ in range(rng.choice((1, 2, 4, 8, 100))))
    length = rng.choice((1, 4, 64, 1000))
    changed = {
        0: lambda: data[:at],
        1: lambda: data[:at] + some + data[at:],
        2: lambda: data[:at] + data[at + length :],
        3: lambda: data[:at] + some + data[at + len(some) :],
        4: lambda: data + some,
        5: lambda: data[:at] + data[at : at + length] * rng.choice((2, 50)) + data[at + length :],
        6: lambda: data[:at] + b"\xff" * length + data[at + length :],
        7: lambda: data[:at] + b"\x00" * length + data[at + length :],
    }[kind]()
    return changed if changed != data else data + b"\x01"


def damaged_json(text: str, rng: random.Random) -> str:
    """Replace, remove, add or double a value anywhere; or break the text itself."""
    if rng.random() < 0.15:
        return rng.choice(RAW_JSON)
    try:
        value = json.loads(text)
    except ValueError:  # damaged before
        return rng.choice(RAW_JSON)
    places = list(_places(value))
    if not places:
        return rng.choice(RAW_JSON)
    holder, key = rng.choice(places)
    action = rng.randrange(6)
    if action == 0:
        del holder[key]
    elif action == 1 and isinstance(holder, dict):
        holder[rng.choice(("unknown", "", "\ud800", "a" * 500))] = rng.choice(ODD_VALUES)
    elif action == 2 and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
        holder[key] = holder[key] * rng.choice((-1, 2, 1000, 10**12, 0.5))
    elif action == 3:
        holder[key] = copy.deepcopy(rng.choice(places)[0])
    else:
        holder[key] = rng.choice(ODD_VALUES)
    written = json.dumps(value)
    return written.replace('"', '"version": 1, "version": 2, "', 1) if rng.random() < 0.05 else written


def _places(value: Any) -> Any:
    """Every (container, key) of a JSON value; of long lists only the beginning."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:20]) if isinstance(value, list) else ()
    for key, inner in list(items)[:200]:
        yield value, key
        yield from _places(inner)


def odd_file(path: Path, rng: random.Random) -> None:
    """Put something else in the place of a file: nothing, a pipe, a device, a directory, a link, a huge hole."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

    def hole() -> None:
        with path.open("wb") as file:
            file.truncate(8 << 30)

    makers: list[Callable[[], object]] = [
        lambda: None,
        lambda: os.mkfifo(path),
        lambda: path.symlink_to("/dev/zero"),
        path.mkdir,
        lambda: path.symlink_to("/proc/version"),
        lambda: path.symlink_to(path.name),
        path.touch,
        hole,
        lambda: path.symlink_to("/proc/self/maps"),
    ]
    rng.choice(makers)()


def damage_file(path: Path, rng: random.Random) -> str:
    """Damage one file in the way that its kind asks for; says what was done."""
    roll = rng.random()
    if roll < 0.1 or path.is_symlink() or path.stat().st_size > LARGE:  # nothing is ever written through a link
        odd_file(path, rng)
        return f"{path.name}: odd file"
    if path.suffix == ".json" and roll < 0.8:
        path.write_bytes(damaged_json(path.read_text(encoding="utf-8"), rng).encode("utf-8", "surrogatepass"))
        return f"{path.name}: JSON"
    path.write_bytes(damaged_bytes(path.read_bytes(), rng))
    return f"{path.name}: bytes"
