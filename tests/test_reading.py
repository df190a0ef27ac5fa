"""Reading within bounds: only regular files, limited sizes, strict JSON, panics as errors."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from herdgraph.errors import HerdError
from herdgraph.reading import open_file, panics_refused, parse_json, read_bytes, read_json, read_text, require_within


def test_open_file_follows_links(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("real")
    with open_file(tmp_path / "link", most=3) as file:
        assert file.read() == b"abc"


@pytest.mark.parametrize(("name", "problem"), [
    ("pipe", "not a regular file"), ("device", "not a regular file"), ("directory", "is a directory"),
    ("nothing", "No such file"), ("a\0b", "no name of a file"), ("\ud800", "no name of a file"),
])
def test_open_file_refuses_what_never_ends(tmp_path: Path, name: str, problem: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "directory").mkdir()
    with pytest.raises(HerdError, match=problem):
        open_file(tmp_path / name)


def test_sizes_are_limited_by_what_is_read(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(8 << 30)
    for read in (read_json, read_text):
        with pytest.raises(HerdError, match="has 8589934592 bytes, at most"):
            read(tmp_path / "sparse")
    with pytest.raises(HerdError, match="more than 4 bytes"):  # its size is given as 0
        read_bytes(Path("/proc/self/status"), most=4)


def test_text_must_be_utf8(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(HerdError, match="byte 3"):
        read_text(tmp_path / "latin")


@pytest.mark.parametrize(("text", "problem"), [
    ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' is given twice"), ('{"a": NaN}', "NaN is no JSON number"),
    ('{"a": -Infinity}', "-Infinity"), (r'{"a\ud800": 1}', "half a character"),
    (r'["\uDFFF"]', "half a character"), ("[" * 100_000, "nested too deeply"), ("{", "Expecting"),
    (b"\xff\xff", "JSON"),
])
def test_json_is_strict(text: str | bytes, problem: str) -> None:
    with pytest.raises(HerdError, match=problem):
        parse_json(text, "it")


def test_pairs_of_halves_are_one_character() -> None:
    assert parse_json(r'["\ud83d\ude00"]', "it") == ["\U0001f600"]


def test_numbers_of_many_digits_cost_nothing() -> None:
    """Python's own conversion refuses them with a ValueError of its own, or takes quadratic time."""
    assert parse_json("1" * 5000, "it") == float("inf")
    assert parse_json("9" * 18, "it") == 10**18 - 1


def test_require_within_names_both() -> None:
    assert require_within("the expert", 3, 3) == 3
    for count in (-1, 4):
        with pytest.raises(HerdError, match=f"the expert is {count}, it must be within 0 and 3"):
            require_within("the expert", count, 3)


def test_panics_become_errors() -> None:
    panic = type("PanicException", (BaseException,), {})
    with pytest.raises(HerdError, match="reading it failed inside of a library: slice"), panics_refused("reading it"):
        raise panic("slice index")
    with pytest.raises(KeyboardInterrupt), panics_refused("reading it"):
        raise KeyboardInterrupt
