"""More hands, shapes and clips as data, from packages made here: no network."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from examples.calf import extras, shapes
from examples.calf.clips import FRAMES, write_clips
from examples.calf.emoji import Emoji
from examples.calf.shapes import TURNS, write_shapes
from examples.calf.vendors import matched
from herdgraph.errors import HerdError
from herdgraph.model.data import open_samples


def emoji(code: str, name: str, *aliases: str) -> Emoji:
    return Emoji(code, name, name.upper(), aliases, "things", "thing", Path("none.png"))


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_drawings_find_their_emoji_by_any_of_its_names() -> None:
    icons = {"icons": {"redapple": {"body": "a"}, "cherry-blossom": {"body": "b"}, "man-farmer": {"body": "c"}},
             "aliases": {"apple": {"parent": "redapple"}}}
    asked = [emoji("1f34e", "red apple"), emoji("1f338", "flower", "cherry blossom"), emoji("1f463", "footprints"),
             emoji("1f468-200d-1f33e", "somebody"), emoji("0001", "x", "apple")]
    found = matched(asked, icons, {"1f468-1f33e": "man-farmer"})
    assert {code: icon["body"] for code, icon in found.items()} == {
        "1f34e": "a", "1f338": "b", "1f468-200d-1f33e": "c", "0001": "a"}


def test_shapes_keep_their_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "test"):
        Image.new("RGB", (64, 64), "blue").save(tmp_path / f"{split}.png")
    asked = [("what color is the shape?", "blue"), ("what shape is in the image?", "circle"),
             *[(f"is there a {color} shape?", "no") for color in ("red", "green", "gray", "teal")]]
    texts, answers = zip(*asked, strict=True)
    package = SimpleNamespace()
    for split in ("train", "test"):
        setattr(package, f"get_{split}_image_paths", partial(dict, {0: str(tmp_path / f"{split}.png")}))
        setattr(package, f"get_{split}_questions", partial(tuple, (texts, answers, [0] * len(asked))))
    monkeypatch.setattr(shapes, "needed", lambda _: package)
    counts = write_shapes(tmp_path)
    assert counts == {"shapes": 1, "shape_names": 1, "shapes_test": len(asked)}
    assert rows(tmp_path / "shape_names.jsonl")[0]["content"][1] == "blue circle"
    trained = rows(tmp_path / "shapes.jsonl")
    assert [len(row["messages"]) for row in trained] == [2 * TURNS]
    assert {row["messages"][0]["content"][0]["image"] for row in trained} == {str(tmp_path / "train.png")}
    for row, (question, answer) in zip(rows(tmp_path / "shapes_test.jsonl"), asked, strict=True):
        assert row["messages"][0]["content"] == [{"image": str(tmp_path / "test.png")}, {"text": question}]
        assert row["messages"][1]["content"] == answer


def test_clips_say_what_they_show(tmp_path: Path) -> None:
    known = {f"1f60{number}": color for number, color in enumerate(
        ("red", "lime", "blue", "white", "black", "yellow", "gray", "teal", "navy", "pink"))}
    (tmp_path / "package" / "assets").mkdir(parents=True)
    (tmp_path / "pictures").mkdir()
    for code, color in known.items():
        frames = [Image.new("RGB", (8, 8), color) for _ in range(FRAMES[-1] + 2)]
        for number, frame in enumerate(frames):
            frame.putpixel((0, 0), (number, 0, 0))  # equal frames would be joined
        frames[0].save(tmp_path / "package" / "assets" / f"{code}.webp", save_all=True, append_images=frames[1:],
                       lossless=True)
    counts = write_clips(tmp_path, [emoji(code, color) for code, color in known.items()], tmp_path / "package",
                         clips=60, asked=30, held_out=0.4)
    assert counts == {"clips": 60, "clips_test": 30}
    shown = {}
    for name in counts:
        found = rows(tmp_path / f"{name}.jsonl")
        shown[name] = {Path(frame).name.split("-")[0] for row in found
                       for frame in row["messages"][0]["content"][0]["video"]}
        for row in found:
            _check(row, known)
        assert {row["kind"] for row in found} == {"first", "when", "count"}
    assert not shown["clips"] & shown["clips_test"]
    samples = open_samples([tmp_path / "clips.jsonl"])
    assert len(samples[0].pictures) == len(rows(tmp_path / "clips.jsonl")[0]["messages"][0]["content"][0]["video"])


def _check(row: dict[str, Any], known: dict[str, str]) -> None:
    """The answer follows from the frames."""
    question, answer = row["messages"]
    names = [known[Path(frame).name.split("-")[0]] for frame in question["content"][0]["video"]]
    text = question["content"][1]["text"]
    if row["kind"] == "count":
        assert answer["content"] == ("One.", "Two.", "Three.")[len(set(names)) - 1]
    elif row["kind"] == "when":
        assert names[int(text.split()[-1][:-1])] in answer["content"].lower()
    else:
        first = next(name for name in names if name in text)
        assert first in answer["content"].lower()


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(extras, "import_module", missing)
    with pytest.raises(HerdError, match=r"^resvg_py is needed to make a calf: pip install -e '.\[calf\]'$"):
        extras.needed("resvg_py")
