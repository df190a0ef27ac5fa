"""More hands, shapes and clips as data, from packages made here: no network."""

from __future__ import annotations

import json
import re
from functools import partial
from itertools import pairwise
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from benchmarks.calf import answered_at_0
from examples.calf import extras, shapes
from examples.calf.clip_questions import Clip, Scene, conclusion, several_questions
from examples.calf.clips import FRAMES, write_clips
from examples.calf.emoji import Emoji
from examples.calf.lists import LINES, write_lists
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
    assert counts == {"shapes": 2, "shape_names": 1, "shapes_test": len(asked)}
    assert rows(tmp_path / "shape_names.jsonl")[0]["content"][1] == "blue circle"
    trained = rows(tmp_path / "shapes.jsonl")
    assert [len(row["messages"]) for row in trained] == [2 * TURNS, 2 * (len(asked) - TURNS)]
    questions = [message["content"][-1]["text"] for row in trained for message in row["messages"][::2]]
    assert sorted(questions) == sorted(texts), "each is asked once"
    assert {row["messages"][0]["content"][0]["image"] for row in trained} == {str(tmp_path / "train.png")}
    for row, (question, answer) in zip(rows(tmp_path / "shapes_test.jsonl"), asked, strict=True):
        assert row["messages"][0]["content"] == [{"image": str(tmp_path / "test.png")}, {"text": question}]
        assert row["messages"][1]["content"] == answer


COLORS = ("red", "lime", "blue", "white", "black", "yellow", "gray", "teal", "navy", "pink")
SHAPES = ("teal circle", "red circle", "teal triangle", "red triangle")
HANDS = ("google", "noto_v1", "fluent_emoji")
KNOWN = {f"1f60{number}": color for number, color in enumerate(COLORS)}


def animated(directory: Path) -> Path:
    """A package in which every second emoji moves, and the others are a single frame."""
    package = directory / "package"
    (package / "assets").mkdir(parents=True)
    for index, (code, color) in enumerate(KNOWN.items()):
        frames = [Image.new("RGB", (8, 8), color) for _ in range(FRAMES[-1] + 2 if index % 2 else 1)]
        for number, frame in enumerate(frames):
            frame.putpixel((0, 0), (number, 0, 0))  # equal frames would be joined
        frames[0].save(package / "assets" / f"{code}.webp", save_all=True, append_images=frames[1:], lossless=True)
    return package


def clips(directory: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of clips of these animations, and of drawings of them and of another emoji."""
    known = [*(emoji(code, color) for code, color in KNOWN.items()), emoji("1f700", "brown")]
    (directory / "pictures").mkdir()
    pairs = [(f"{one.code}-{hand}{view}", one.name) for one in known for hand in HANDS for view in "01"]
    (directory / "pairs.jsonl").write_text("".join(
        json.dumps({"key": f"{key}-name", "content": [{"image": f"pictures/{key}.png"}, name]}) + "\n"
        for key, name in pairs))
    (directory / "shape_names.jsonl").write_text("".join(
        json.dumps({"key": f"shape-{number}-name", "content": [{"image": f"{number}.png"}, SHAPES[number % 4]]}) + "\n"
        for number in range(12)))
    counts = write_clips(directory, known, known[:-1], animated(directory), clips=90, asked=30, held_out=0.4)
    assert counts == {"clips": 90, "clips_new": 30, "clips_test": 30}
    return {name: rows(directory / f"{name}.jsonl") for name in counts}


def video(row: dict[str, Any]) -> list[str]:
    found: list[str] = row["messages"][0]["content"][0]["video"]
    return [Path(frame).stem for frame in found]


def test_clips_say_what_they_show(tmp_path: Path) -> None:
    made = clips(tmp_path)
    for row in (*made["clips"], *made["clips_new"], *made["clips_test"]):
        _check(row, KNOWN | {"1f700": "brown"} | {str(number): SHAPES[number % 4] for number in range(12)})
    kinds = {kind for row in made["clips"] for kind in row["kind"].split()}
    assert kinds == {"first", "when", "count", "begins", "list"}
    asked_first = {row["kind"].split()[0] for row in made["clips"]}
    assert asked_first == kinds, "each kind is to be answered as a first question, as it is evaluated"
    for name in ("clips_new", "clips_test"):
        assert {row["kind"] for row in made[name]} == {"first", "when", "count"}
    samples = open_samples([tmp_path / "clips_test.jsonl"])
    shown = [len(samples[index].pictures) for index in range(len(samples))]
    assert shown == [len(video(row)) for row in made["clips_test"]]


def test_training_asks_for_what_is_not_at_the_beginning() -> None:
    """Or the calf names what is at second 0, which is right too often."""
    clip = Clip([Scene(name, ()) for name in ("a cat", "a dog", "a cow")], [1, 1, 1])
    answers = [asked["first"][1] for seed in range(600) if "first" in (asked := several_questions(Random(seed), clip))]
    assert set(answers) == {"0: a cat? A cat.", "0: a cat. 1: a dog? A dog."}
    assert 0.58 < sum(answer.endswith("A dog.") for answer in answers) / len(answers) < 0.75


@pytest.mark.parametrize(("answer", "is_at_0"), [
    ("0: a dog? A dog.", True), ("0: the sun? The sun.", True), ("0: a sun. 1: a dog? A dog.", False),
    ("0: a dog. 1: a dog again. One.", False), ("A dog.", False), ("no", False),
])
def test_what_can_be_answered_from_second_0_is_told_apart(answer: str, is_at_0: bool) -> None:
    assert answered_at_0({"messages": [{"role": "assistant", "content": answer}]}) == is_at_0


def test_a_conclusion_is_what_is_said_behind_the_list() -> None:
    assert conclusion("0: a dog. 1: a dog again. Two.") == "Two."
    assert conclusion("0: a cat. 1: a dog? A dog.") == "A dog."
    assert conclusion("A dog.") == "A dog."
    assert conclusion("0: a dog. 1: a cat. One.") != "Two."


def test_clips_to_evaluate_on_were_not_trained(tmp_path: Path) -> None:
    made = clips(tmp_path)
    frames = {name: {frame for row in several for frame in video(row)} for name, several in made.items()}
    shown = {name: {frame.split("-")[0] for frame in several} for name, several in frames.items()}
    never = {frame for frame in frames["clips"] if frame.split("-")[0] in shown["clips_test"]}
    assert {frame.split("-")[1][:-1] for frame in never} == {"google", "noto_v1"}, "drawn by other hands only"
    assert shown["clips_new"] < shown["clips"]
    assert frames["clips_new"] & frames["clips"] == {frame for frame in frames["clips_new"] if frame.endswith("frame0")}
    moves = {frame.split("-")[0] for frame in frames["clips_new"] if frame.endswith(("frame4", "frame12"))}
    assert moves
    assert moves == {code for code in shown["clips_new"] if list(KNOWN).index(code) % 2}


def test_training_joins_shapes_and_drawings_of_one_hand(tmp_path: Path) -> None:
    trained = [video(row) for row in clips(tmp_path)["clips"]]
    drawn = [frames for frames in trained if "-" in frames[0] and "-frame" not in frames[0]]
    assert len(drawn) > 10
    assert sum(frames[0].isdigit() for frames in trained) > 10
    for frames in drawn:
        hands = {frame.split("-")[0]: frame.split("-")[1][:-1] for frame in frames}
        assert all(hands[frame.split("-")[0]] == frame.split("-")[1][:-1] for frame in frames)


def _check(row: dict[str, Any], known: dict[str, str]) -> None:
    """The answers follow from the frames."""
    names = [known[frame.split("-")[0]] for frame in video(row)]
    asked, answers = row["messages"][::2], row["messages"][1::2]
    assert len(asked) == len(row["kind"].split())
    for kind, question, answer in zip(row["kind"].split(), asked, answers, strict=True):
        text, aloud = question["content"][-1]["text"], answer["content"].lower()
        said = conclusion(aloud)
        if kind != "when":
            listed = _list(names, text if kind in ("first", "begins") else "")
            assert aloud == (listed if kind == "list" else f"{listed} {said}")
        if kind == "count":
            assert said == ("one.", "two.", "three.")[len(set(names)) - 1]
        elif kind == "when":
            assert names[int(text.split()[-1][:-1])] in said
        elif kind == "first":
            assert said == f"a {next(name for name in names if f'a {name}?' in text)}."
        elif kind == "begins":
            thing = text.removeprefix("When does it begin: a ").removesuffix("?")
            assert said == f"at second {names.index(thing)}."


def _list(names: list[str], question: str) -> str:
    """What is at each second, as far as the first thing that the question asks for."""
    lines = []
    for second, (before, name) in enumerate(pairwise(["", *names])):
        lines.append(f"{second}: a {name}{' again' * (name == before)}.")
        if f"a {name}?" in question:
            return " ".join(lines).removesuffix(".") + "?"
    return " ".join(lines)


def test_lists_mark_what_was_asked_for(tmp_path: Path) -> None:
    things = [f"a {name}" for name in COLORS]
    shapes = [f"a {name}" for name in SHAPES]
    assert write_lists(tmp_path, things, shapes, lists=50) == {"lists": 50}
    kinds = set()
    for row in rows(tmp_path / "lists.jsonl"):
        (question,), answer = (message["content"] for message in row["messages"])
        lines = re.findall(r"(\d): (a [ a-z]+)([.?])", answer)
        assert [int(second) for second, _, _ in lines] == list(range(LINES))
        assert all((mark == "?") == (f"{name}?" in question["text"]) for _, name, mark in lines)
        assert all(before[1] != now[1] for before, now in pairwise(lines))
        names = {name for _, name, _ in lines}
        assert names <= set(things) or names <= set(shapes)
        kinds.add((question["text"].split()[0], names <= set(things)))
    assert kinds == {("Which", True), ("Which", False), ("When", True), ("When", False)}


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(extras, "import_module", missing)
    with pytest.raises(HerdError, match=r"^resvg_py is needed to make a calf: pip install -e '.\[calf\]'$"):
        extras.needed("resvg_py")
