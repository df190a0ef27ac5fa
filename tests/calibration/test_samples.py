"""Calibration data: every kind that is read, and one line for everything that is wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from herdgraph.calibration.samples import drawn, read_samples
from herdgraph.calibration.windows import Data, Window, data_of, split, windows_of
from herdgraph.errors import HerdError
from herdgraph.model.checkpoint import Checkpoint, open_checkpoint
from herdgraph.model.config.presets import TINY
from herdgraph.model.data import IMAGE, Picture, Record
from herdgraph.model.processing import PreparedPrompt
from herdgraph.model.processing.messages import checked_messages
from support import clips, herds

TEXT = "A herd of words that is long enough to be a window. "


def read(*paths: Path, images: bool = False) -> list[Record]:
    return list(read_samples(paths, images=images))


def sources_of(sample: Record) -> list[Any]:
    return [picture.source for picture in sample.pictures]


def picture(path: Path, size: tuple[int, int] = (30, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "green").save(path)
    return path


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, config in (("seeing", TINY), ("reading", herds.variant()),
                         ("short", herds.variant(max_position_embeddings=64))):
        found[name] = tmp_path_factory.mktemp("samples") / name
        herds.save(config, found[name])
        herds.write_processor(found[name])
    return found


def document(*parts: str | Picture) -> Record:
    return Record("sample", "sample", document=parts)


def data(checkpoint: Path, *samples: Record, **options: Any) -> Data:
    with open_checkpoint(checkpoint) as source:
        return data_of(source, samples, **options)


@pytest.mark.parametrize("name", ["a.txt", "a.md", "A.TXT", "README"])
def test_text(name: str, tmp_path: Path) -> None:
    text = TEXT * 50 + "\n\nDie Kühe\u2028grasen.\n" + "x" * 2000
    (tmp_path / name).write_text(text, encoding="utf-8")
    found = read(tmp_path / name)
    assert "".join(sample.completion() for sample in found) == text
    assert len(found) > 3, "in pieces, so that other data has its turn"
    assert all(sample.is_plain_text and sample.origin == str(tmp_path / name) for sample in found)


def test_lines_of_every_form(tmp_path: Path) -> None:
    picture(tmp_path / "pictures" / "one.png")
    picture(tmp_path / "pictures" / "two.png")
    one, two = tmp_path / "pictures" / "one.png", tmp_path / "pictures" / "two.png"
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"},
                                         {"type": "image", "path": "pictures/two.png"}]},
            {"role": "assistant", "content": "a cow"}]
    found = read(lines(
        tmp_path / "data.jsonl", {"text": "plain\u2028text", "images": None}, "", {"images": ["pictures/one.png"]},
        {"image": "pictures/one.png", "text": "look"},
        {"text": f"before {IMAGE} after", "images": ["pictures/one.png", "pictures/two.png"]},
        {"messages": chat, "images": ["pictures/one.png"]}, {"messages": [{"role": "user", "content": "hi"}]},
    ))
    assert [sample.completion() for sample in found[:4]] == [
        "plain\u2028text", IMAGE, f"{IMAGE}look", f"{IMAGE}before {IMAGE} after"]
    assert [sources_of(sample) for sample in found] == [[], [one], [one], [one, two], [one, two], []]
    asked, answered = (turn.message() for turn in found[4].turns)
    assert asked == {"role": "user", "content": [
        {"type": "image", "image": one}, {"type": "text", "text": "what?"}, {"type": "image", "image": two}]}
    assert checked_messages([answered]) == [chat[1]]
    assert checked_messages([turn.message() for turn in found[5].turns]) == [{"role": "user", "content": "hi"}]
    assert found[1].origin == f"{tmp_path / 'data.jsonl'} line 3"
    assert [sample.is_plain_text for sample in found] == [True, *[False] * 5]


def test_lines_of_training_data(tmp_path: Path) -> None:
    picture(tmp_path / "cow.png")
    parts = [{"image": "cow.png"}, {"text": "What is it?"}]
    data = lines(tmp_path / "train.jsonl", {"content": ["A ", {"image": "cow.png"}, "."], "key": "cow"},
                 {"messages": [{"role": "user", "content": parts}]}, {"content": [3]})
    found = read_samples([data], images=True)
    assert next(found) == Record("cow", f"{data} line 1", document=("A ", Picture(tmp_path / "cow.png"), "."))
    image = {"type": "image", "image": tmp_path / "cow.png"}
    assert [turn.message() for turn in next(found).turns] == [
        {"role": "user", "content": [image, {"type": "text", "text": "What is it?"}]}]
    with pytest.raises(HerdError, match="line 3: a part is of type int, a text or an object is needed"):
        next(found)


def test_a_raw_line_separator_inside_of_a_line_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one\u2028two\x85three"}\r\n{"text": "four"}\n', encoding="utf-8")
    assert [sample.completion() for sample in read(tmp_path / "a.jsonl")] == ["one\u2028two\x85three", "four"]


def test_pictures(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "c.webp"):
        picture(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not a picture")
    found = read(tmp_path)
    assert [sources_of(sample)[0].name for sample in found] == ["a.JPG", "b.png", "c.webp"]
    assert all(sample.completion() == IMAGE for sample in found)
    assert read(tmp_path / "a.JPG") == found[:1]


def save_dataset(directory: Path, image: bytes) -> None:
    """What ``Dataset.save_to_disk`` writes, for the columns text and image."""
    import pyarrow as pa

    directory.mkdir(parents=True)
    kinds = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    rows = pa.table({"text": ["one", "two"], "image": pa.array([{"bytes": image, "path": None}, None], kinds)})
    with pa.OSFile(str(directory / "data.arrow"), "wb") as file, pa.ipc.new_stream(file, rows.schema) as writer:
        writer.write_table(rows)
    features = {"text": {"dtype": "string", "_type": "Value"}, "image": {"_type": "Image"}}
    state = {"_data_files": [{"filename": "data.arrow"}], "_fingerprint": "0", "_format_columns": None,
             "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False, "_split": None}
    (directory / "state.json").write_text(json.dumps(state))
    (directory / "dataset_info.json").write_text(json.dumps({"features": features}))


def test_a_saved_dataset(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    image = picture(tmp_path / "one.png").read_bytes()
    save_dataset(tmp_path / "rows", image)
    save_dataset(tmp_path / "splits" / "train", image)
    (tmp_path / "splits" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    for found in (read(tmp_path / "rows"), read(tmp_path / "splits")):
        assert [sample.completion() for sample in found] == [f"{IMAGE}one", "two"]
        assert sources_of(found[0])[0].size == (30, 30)
    (tmp_path / "rows" / "state.json").write_text("{}")
    with pytest.raises(HerdError, match="rows cannot be read as a dataset"):
        read(tmp_path / "rows")


class _Splits(dict):  # type: ignore[type-arg]
    pass


class _Rows(list):  # type: ignore[type-arg]
    column_names = ("text", "image", "images")


def test_the_rows_of_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with a stand-in for the library: pictures decoded, as bytes and as paths."""
    image = Image.new("RGB", (30, 30))
    encoded = [{"bytes": b"png", "path": None}, {"bytes": None, "path": "a.png"}]
    rows = _Rows([{"text": "one", "image": image}, {"images": encoded}])
    library = SimpleNamespace(DatasetDict=_Splits, load_from_disk=lambda _: _Splits(train=rows, test=_Rows(rows[:1])))
    monkeypatch.setitem(sys.modules, "datasets", library)
    (tmp_path / "dataset_dict.json").write_text("{}")
    found = read(tmp_path)
    assert [sources_of(sample) for sample in found] == [[image], [b"png", tmp_path / "a.png"]], "of the train split"
    assert found[1].origin == f"{tmp_path} row 1"
    library.load_from_disk = lambda _: (_ for _ in ()).throw(FileNotFoundError("no arrow file"))
    with pytest.raises(HerdError, match="cannot be read as a dataset: no arrow file"):
        read(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(HerdError, match="is a saved dataset: pip install datasets"):
        read(tmp_path)


def test_the_default() -> None:
    text = read()
    assert all(sample.is_plain_text for sample in text)
    assert sum(len(sample.completion()) for sample in text) > 10_000
    both = read(images=True)
    seen = [index for index, sample in enumerate(both) if sample.pictures]
    assert len(seen) == 8
    assert max(seen) < 16, "pictures take turns with the text"
    assert [sample for sample in both if sample.is_plain_text] == text
    assert len({sources_of(sample)[0].size for sample in both if sample.pictures}) == 8
    again = [np.asarray(sources_of(sample)[0]) for sample in drawn()]
    assert all(np.array_equal(a, sources_of(both[at])[0]) for a, at in zip(again, seen, strict=True))


def test_what_stands_beside_a_long_text_is_read_too(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text(TEXT * 1000)
    (tmp_path / "other.txt").write_text("Another herd. " * 100)
    paths = [tmp_path / "long.txt", picture(tmp_path / "one.png"), tmp_path / "other.txt"]
    found = data(checkpoints["seeing"], *read(*paths), most_tokens=2500, held_out=0)
    assert [window.pixels is not None for window in found.measured].count(True) == 1
    text = [token for window in found.measured if window.pixels is None for token in window.token_ids]
    with open_checkpoint(checkpoints["seeing"]) as source:
        other = _encode(source, "Another herd. ")
    assert any(text[at : at + len(other)] == other for at in range(len(text)))
    assert found.tokens <= 2500 + 20


def _encode(source: Checkpoint, text: str) -> list[int]:
    from herdgraph.model.processing import PromptProcessor

    return PromptProcessor(source.directory, source.config).tokenizer.encode(text)


WRONG = {
    "nothing there": (lambda t: t / "none.txt", "none.txt does not exist: give a text, a .jsonl or .tar file"),
    "unknown kind": (lambda t: lines(t / "a.pdf", "x"), r"a\.pdf is a \.pdf file: \.txt, \.jsonl"),
    "no text": (lambda t: _bytes(t / "a.txt", b"\xff\xfe"), r"a\.txt cannot be read as UTF-8 text"),
    "not JSON": (lambda t: lines(t / "a.jsonl", {"text": "x"}, "{text}"), r"a\.jsonl line 2 cannot be read as JSON: "),
    "deep JSON": (
        lambda t: lines(t / "a.jsonl", "[" * 100_000),
        r"a\.jsonl line 1 cannot be read as JSON, it is nested too deeply"),
    "no object": (
        lambda t: lines(t / "a.jsonl", "[1]"),
        r"line 1 is a list: a sample is an object with text, content or messages"),
    "no fields": (
        lambda t: lines(t / "a.jsonl", {"txt": "x"}), "line 1 has neither text, content, messages nor images"),
    "number for text": (lambda t: lines(t / "a.jsonl", {"text": 3}), "line 1: text is of type int, a string is needed"),
    "text for messages": (
        lambda t: lines(t / "a.jsonl", {"messages": "x"}), "line 1: messages is not a list of messages"),
    "number for messages": (
        lambda t: lines(t / "a.jsonl", {"messages": 3}), "line 1: messages is not a list of messages"),
    "text for images": (lambda t: lines(t / "a.jsonl", {"images": "a.png"}), "images is of type str, a list is needed"),
    "number for an image": (lambda t: lines(t / "a.jsonl", {"images": [3]}), "1: a picture is of type int, a path is"),
    "empty image": (lambda t: lines(t / "a.jsonl", {"image": {"bytes": None}}), "a picture is of type NoneType"),
    "image without a place": (
        lambda t: lines(t / "a.jsonl", {"messages": [{"role": "user", "content": "x"}], "images": ["a.png"]}),
        "line 1 has 1 images for 0 places: they must match"),
    "no pictures": (
        lambda t: t,
        r"holds no \.jsonl, \.tar or \.txt files, no pictures and no saved dataset: give another directory"),
}


def _bytes(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_a_video_is_measured_frame_by_frame(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "a.gif").write_bytes(clips.animation(clips.frames(), kind="gif"))
    asked = [{"role": "user", "content": [{"type": "video", "path": "a.gif"}, "?"]}]
    rows = lines(tmp_path / "a.jsonl", {"messages": asked}, {"content": [{"video": "a.gif", "max_frames": 2}, "!"]})
    found = data(checkpoints["seeing"], *read(rows), held_out=0)
    assert [len(window.pixels) for window in found.measured if window.pixels is not None] == [4, 2]


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_are_one_line(case: str, tmp_path: Path) -> None:
    make, message = WRONG[case]
    with pytest.raises(HerdError, match=message) as caught:
        read(make(tmp_path))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(HerdError, match="is not a regular file"):
        read(tmp_path / "a.txt")


CHAT = {"role": "user", "content": [{"type": "image"}]}
UNUSABLE = {
    "empty text": ("seeing", lambda t: lines(t / "a.txt"), r"a\.txt is empty: it holds no samples"),
    "short text": ("seeing", lambda t: lines(t / "a.txt", "too short"), "the data has fewer than 16 tokens: give more"),
    "broken picture": ("seeing", lambda t: _bytes(t / "broken.png", b"\x89PNG\r\n\x1a\n" + b"0" * 50), r"broken\.png"),
    "lost picture": ("seeing", lambda t: lines(t / "a.jsonl", {"images": ["lost.png"]}), r"line 1: .*lost\.png cannot"),
    "blind": ("reading", lambda t: picture(t / "a.png"), r"a\.png: .*this model reads text only, images were given"),
    "placeholder": ("seeing", lambda t: lines(t / "a.jsonl", {"text": IMAGE * 2, "image": str(picture(t / "a.png"))}),
                    "line 1 has 2 image placeholders and 1 images: they must match"),
    "role": ("seeing", lambda t: lines(t / "a.jsonl", {"messages": [{"role": "cow", "content": "moo"}]}),
             "line 1: message 0 has role 'cow'"),
    "no message": ("seeing",
        lambda t: lines(t / "a.jsonl", {"messages": ["moo"]}), "line 1: message 0 is no object with role and content"),
    "chat without a picture": ("seeing", lambda t: lines(t / "a.jsonl", {"messages": [CHAT]}),
                               "line 1: there are more parts of type image than images: they must match"),
    "beyond the context": ("short", lambda t: lines(t / "a.jsonl", {"messages": [CHAT | {"content": "x" * 99}]}),
                           "line 1: the prompt has 1.. tokens, the model's context is 64: shorten it"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_what_a_model_cannot_use_is_one_line(case: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    name, make, message = UNUSABLE[case]
    with pytest.raises(HerdError, match=message) as caught:
        data(checkpoints[name], *read(make(tmp_path)))
    assert "\n" not in str(caught.value)


def test_pictures_become_tokens_and_tiles(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    found = data(checkpoints["seeing"], *read(picture(tmp_path / "wide.png", (80, 30))), held_out=0).measured
    assert len(found) == 1
    assert found[0].pixels is not None
    assert found[0].pixels.shape[1:] == (3, 28, 28)
    per_tile = TINY.vision.tokens_per_tile  # type: ignore[union-attr]
    assert found[0].token_ids.count(500) == per_tile * len(found[0].pixels)
    assert len(found[0].pixels) == 4, "three tiles and the whole"


def windows(*texts: str, **options: int) -> list[Window]:
    prepare = lambda sample: PreparedPrompt([7] * len(sample.document[-1]))  # noqa: E731
    samples = [document(Picture(b""), text[1:]) if text.startswith("!") else document(text) for text in texts]
    return windows_of(samples, prepare, lambda text: [ord(letter) for letter in text],
                      **{"context": 4096, "most_tokens": 10**6, **options})


def test_plain_texts_are_joined_and_cut() -> None:
    lengths = [len(window.token_ids) for window in windows("a" * 700, "!bbb", "c" * 330, "!dd")]
    assert lengths == [512, 512, 3, 2], "the last 6 tokens of text are too few, pictures stand for themselves"
    assert [len(window.token_ids) for window in windows("a" * 70, context=30)] == [30, 30]
    joined = windows("a" * 20, "b" * 20)
    assert joined == [Window([ord("a")] * 20 + [ord("b")] * 20)]


def test_enough_is_enough() -> None:
    endless = iter(lambda: document("x" * 100), None)
    count = lambda text: [1] * len(text)  # noqa: E731
    found = windows_of(endless, lambda _: PreparedPrompt([]), count, context=99, most_tokens=1000)
    assert sum(len(window.token_ids) for window in found) == 990, "the last 10 are too few for a window"
    lengths = [len(window.token_ids) for window in windows("!" + "b" * 90, "a" * 90, "!cc", most_tokens=100)]
    assert lengths == [90], "10 tokens of text are too few for a window, and then it is enough"


@pytest.mark.parametrize(("count", "share", "held"), [
    (1, 0.15, []), (2, 0.15, [0]), (7, 0.15, [3]), (20, 0.15, [4, 9, 14]), (10, 0.5, [1, 2, 4, 6, 7]), (2, 0.99, [0]),
    (10, 0, []),
])
def test_windows_are_held_out_evenly(count: int, share: float, held: list[int]) -> None:
    found = split([Window([index]) for index in range(count)], share)
    assert [window.token_ids[0] for window in found.held_out] == held
    assert [window.token_ids[0] for window in found.measured] == [at for at in range(count) if at not in held]


def test_pictures_are_held_out_and_measured() -> None:
    """Both kinds on both sides, and the only picture is measured: without it the image tower would have no scales."""
    tile = np.zeros((1, 3, 28, 28), np.float32)
    one = split([*(Window([index]) for index in range(3)), Window([9], tile)], 0.3)
    assert [window.token_ids[0] for window in one.measured] == [0, 2, 9]
    many = split([*(Window([index]) for index in range(8)), *(Window([index], tile) for index in range(8, 12))], 0.25)
    assert {window.pixels is None for window in many.held_out} == {True, False}
    assert {window.pixels is None for window in many.measured} == {True, False}


def test_a_digest_is_of_all_data() -> None:
    tile = np.zeros((1, 3, 2, 2), np.float32)
    some = [
        Data([Window([1, 2]), Window([3])], []), Data([Window([1]), Window([2, 3])], []), Data([Window([1, 2, 3])], []),
        Data([Window([1, 2])], [Window([3])]), Data([Window([3]), Window([1, 2])], []),
        Data([Window([1, 2], tile), Window([3])], []), Data([Window([1, 2], tile + 1), Window([3])], []),
    ]
    assert len({found.digest() for found in some}) == len(some)
    assert some[0].digest() == Data([Window([1, 2]), Window([3])], []).digest()
    assert some[3].tokens == 2
