"""Data files that were made to do harm: each is refused in one line, at once, and within bounds."""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from herdgraph.errors import HerdError
from herdgraph.model.data import TextPages, hold_out, open_samples
from herdgraph.reading import LINE_BYTES


def read_all(path: Path) -> None:
    samples = open_samples([path])
    hold_out(samples, 1e-9)
    for index in range(len(samples)):
        samples[index]


def refused(path: Path) -> str:
    """The one line of opening a file and of reading what it holds."""
    with pytest.raises(HerdError) as caught:
        read_all(path)
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.tar", "a.txt"])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["fifo", "zero"])
def test_what_may_never_end_is_refused(name: str, make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / name)
    assert f"{name} is not a regular file" in refused(tmp_path / name)
    with pytest.raises(HerdError, match="is not a regular file"):
        open_samples([tmp_path])


@pytest.mark.parametrize(("line", "message"), [
    ('{"text": NaN}', "line 1 cannot be read as JSON: NaN is no JSON number"),
    ('{"text": "a", "text": "b"}', "the key 'text' is given twice"),
    ("[" * 100_000, "nested too deeply"),
    ('{"text": "a", "images": ["a\\u0000.png"]}', r"line 1: the picture's name 'a\x00.png' is no name of a file"),
    ('{"text": "a", "images": ["\\ud800.png"]}', "a text in it has half a character"),
])
def test_rows(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(line)
    assert message in refused(tmp_path / "a.jsonl")


def test_a_line_without_end(tmp_path: Path) -> None:
    with (tmp_path / "a.jsonl").open("wb") as file:
        file.write(b'{"text": "moo"}\n')
        file.truncate(1 << 33)
    assert f"a.jsonl line 2 has more than {LINE_BYTES} bytes" in refused(tmp_path / "a.jsonl")


def test_half_a_character_as_a_key_names_a_sample(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "moo", "key": "\\ud800"}')
    train, _ = hold_out(open_samples([tmp_path / "a.jsonl"]), 0.0001)
    assert len(train) == 1


def member_with(size: bytes | None = None, kind: bytes | None = None, pax: dict[str, str] | None = None) -> bytes:
    """A shard whose first header was altered: its checksum fits."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("a.txt")
        info.size, info.pax_headers = 5, pax or {}
        archive.addfile(info, io.BytesIO(b"hello"))
    data = bytearray(stream.getvalue())
    data[124:136] = size or data[124:136]
    data[156:157] = kind or data[156:157]
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    return bytes(data)


def base_256(size: int) -> bytes:
    return (b"\xff" if size < 0 else b"\x80") + (size % (1 << 88)).to_bytes(11, "big")


@pytest.mark.parametrize(("shard", "message"), [
    (member_with(base_256(-512)), "its member 'a.txt' has -512 bytes, which are not there"),
    (member_with(base_256(-5000)), "has -5000 bytes"),
    (member_with(base_256(1 << 62)), "bytes, which are not there"),
    (member_with(b"notanumber\0\0"), "invalid header"),
    (member_with(base_256(1 << 40), b"x"), "the size of a header in bytes is 1099511627776"),
    (member_with(base_256(1 << 40), b"L"), "the size of a header in bytes is 1099511627776"),
    (member_with(pax={"size": "-7"}), "has -7 bytes"),
    (member_with(pax={"GNU.sparse.map": "a,b"}), "cannot be read as an uncompressed tar file: invalid literal"),
    (member_with(pax={"GNU.sparse.map": "0,5", "GNU.sparse.size": "100"}), "has 100 bytes"),
])
def test_sizes_and_headers_of_shards(shard: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(shard)
    assert message in refused(tmp_path / "a.tar")


def test_too_many_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("herdgraph.model.data.tar_shards._MEMBERS", 3)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number in range(5):
            archive.addfile(tarfile.TarInfo(f"{number}.txt"))
    assert "it has more than 3 members" in refused(tmp_path / "a.tar")


def test_a_large_member(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.json")
    info.size = LINE_BYTES + 1
    (tmp_path / "a.tar").write_bytes(info.tobuf() + bytes(-(-info.size // 512) * 512))
    assert f"member a.json: its size in bytes is {info.size}" in refused(tmp_path / "a.tar")


# --- pages of a text

def pages_of(path: Path, room: int) -> TextPages:
    """Pages where each byte is a token."""
    return TextPages(path, lambda text: len(text.encode()), room)


@pytest.mark.parametrize("text", [
    "The herd grazes.\n" * 200, "no end " * 100, "ä" * 500, "x" * 999, "a", "🐄" * 70 + " moo", "\n" * 99,
])
@pytest.mark.parametrize("room", [4, 70])
def test_pages_are_the_whole_text(text: str, room: int, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    pages = pages_of(tmp_path / "a.txt", room)
    parts = [pages[index].document[0] for index in range(len(pages))]
    assert "".join(map(str, parts)) == text
    assert all(len(str(part).encode()) <= room for part in parts)
    assert len(parts) <= 2 + 2 * len(text.encode()) / room
    assert pages[0].key == pages.key(0)


def test_pages_end_with_a_line_or_a_word(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two\nthree four five six seven")
    pages = pages_of(tmp_path / "a.txt", 12)
    assert [pages[index].document for index in range(len(pages))] == [("one two\n",), ("three four ",), ("five six ",),
                                                                      ("seven",)]


def test_a_page_has_as_many_lines_as_its_tokens_allow(tmp_path: Path) -> None:
    """Lines of four words, then numbers, which are a token for each digit."""
    words, numbers = "a herd of cattle\n", "0123456789\n"
    (tmp_path / "a.txt").write_text(words * 20 + numbers * 20)
    pages = TextPages(tmp_path / "a.txt", lambda text: len(re.findall(r"\d|[a-z]+", text)), 40)
    found = [str(pages[index].document[0]) for index in range(len(pages))]
    assert found == [words * 10] * 2 + [numbers * 4] * 5


def test_a_page_that_is_not_utf_8_says_where(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good text " * 10 + b"\xff")
    pages = pages_of(tmp_path / "a.txt", 70)
    with pytest.raises(HerdError, match=r"a\.txt cannot be read as UTF-8 text \(byte 100\)"):
        pages[len(pages) - 1]


def test_a_directory_of_texts(tmp_path: Path) -> None:
    for name in ("b.txt", "a.md"):
        (tmp_path / name).write_text(name)
    samples = open_samples([tmp_path])
    assert [samples[index].document[0] for index in range(2)] == ["a.md", "b.txt"]
