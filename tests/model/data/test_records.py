"""Training samples: every kind that is read, what is learned of it, and one line for everything that is wrong."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from herdgraph.errors import HerdError
from herdgraph.model.config import HerdConfig
from herdgraph.model.config.presets import TINY
from herdgraph.model.data import Picture, Record, hold_out, open_samples
from herdgraph.model.data.records import Turn
from herdgraph.model.processing import Frame
from herdgraph.model.training.data import Encoder
from support import clips, herds
from support.clips import animation, film

CHAT = [{"role": "user", "content": "moo?"}, {"role": "assistant", "content": "moo"},
        {"role": "user", "content": "more"}, {"role": "assistant", "content": "moo moo"}]


def picture(path: Path, size: tuple[int, int] = (28, 28), colour: str = "green") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def png(colour: str = "green") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (28, 28), colour).save(buffer, "PNG")
    return buffer.getvalue()


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def shard(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def only(path: Path) -> Record:
    samples = open_samples([path])
    assert len(samples) == 1
    return samples[0]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("processor")
    herds.write_processor(directory)
    return directory


def encoder(files: Path, **options: Any) -> Encoder:
    return Encoder(files, TINY, **{"max_tokens": 200, **options})


def text_of(encoded: Any, files: Path, mask: Any = None) -> str:
    ids = encoded.ids_T if mask is None else encoded.ids_T[mask]
    return encoder(files).processor.tokenizer.decode(ids.tolist(), skip_special=False)


# --- rows

def test_documents(tmp_path: Path) -> None:
    first = {"text": "A <|image|> and \u2028 <|image|>.", "images": ["a.png", "b/c.png"]}
    path = lines(tmp_path / "a.jsonl", first, "", {"content": ["A", {"image": "a.png"}, {"type": "text", "text": "B"}]},
                 {"text": "behind", "image": "a.png", "key": "mine"}, {"images": ["a.png"]})
    samples = open_samples([path])
    a, c = Picture(tmp_path / "a.png"), Picture(tmp_path / "b/c.png")
    assert [samples[i].document for i in range(4)] == [
        ("A ", a, " and \u2028 ", c, "."), ("A", a, "B"), (a, "behind"), (a,)]
    assert samples[1].origin == f"{path} line 3"
    assert samples[2].key == samples.key(2) == "mine"
    assert samples[1].key == samples.key(1)


def test_conversations(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}], "name": "x"},
                {"role": "assistant", "content": "a cow"}]
    record = only(lines(tmp_path / "a.jsonl", {"messages": messages, "images": ["a.png"], "tools": [{"name": "f"}]}))
    assert record.turns[0].parts == (Picture(tmp_path / "a.png"), "what?")
    assert record.turns[0].extra == {"name": "x"}
    assert record.turns[1].parts == ("a cow",)
    assert record.tools == ({"name": "f"},)


def test_videos_are_frames_with_times(tmp_path: Path) -> None:
    record = only(lines(tmp_path / "a.jsonl", {"content": [{"video": ["f0.png", "f1.png"], "fps": 2}, "moo"]}))
    assert record.document == ("Time: 0.0s", Picture(Frame(0.0, tmp_path / "f0.png")),
                               "Time: 0.5s", Picture(Frame(0.5, tmp_path / "f1.png")), "moo")


def test_video_files_are_the_frames_that_a_prompt_has(tmp_path: Path) -> None:
    """By name, in a tar file, and alone; options stand beside the name."""
    (tmp_path / "a.gif").write_bytes(clip := animation(clips.frames(), kind="gif"))
    part = {"type": "video", "path": "a.gif", "max_frames": 2}
    named = only(lines(tmp_path / "a.jsonl", {"content": [part, "moo"]})).document
    assert [part if isinstance(part, str) else part.source.seconds for part in named] == [
        "Time: 0.0s", 0.0, "Time: 1.0s", 1.0, "moo"]
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        _add(archive, "0001.mp4", film(clips.frames()))
        _add(archive, "0001.json", json.dumps({"content": [{"video": "mp4"}, "moo"]}).encode())
    assert len(only(tmp_path / "a.tar").pictures) == 4
    (tmp_path / "a.mp4").write_bytes(film(clips.frames()))
    assert len(only(tmp_path / "a.mp4").pictures) == 4
    (tmp_path / "a.gif").write_bytes(clip[:50])
    with pytest.raises(HerdError, match=r"a\.jsonl line 1: .*a\.gif is a broken"):
        only(tmp_path / "a.jsonl")


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


WRONG: dict[str, tuple[Any, str]] = {
    "not json": ("{", "line 2 cannot be read as JSON"),
    "list": ([1], "line 2 is a list"),
    "nothing": ({"label": 3}, "neither text, content, messages nor images"),
    "empty": ({"text": ""}, "neither text, content, messages nor images"),
    "text": ({"text": 3}, "text is of type int"),
    "images": ({"text": "a", "images": "a.png"}, "images is of type str"),
    "too few": ({"text": "<|image|><|image|>", "images": ["a.png"]}, "2 image placeholders and 1 images"),
    "too many": ({"content": ["a"], "images": ["a.png"]}, "1 images for 0 places"),
    "no image": ({"content": [{"type": "image"}]}, "more parts of type image"),
    "part": ({"content": [{"type": "sound", "sound": "a.wav"}]}, "a part has fields"),
    "part kind": ({"content": [3]}, "a part is of type int"),
    "content": ({"content": 3}, "content is of type int"),
    "messages": ({"messages": []}, "messages is not a list"),
    "tools": ({"messages": CHAT, "tools": 3}, "tools is of type int"),
    "message": ({"messages": [{"content": "a"}]}, "message 0 is no object with role and content"),
    "fps": ({"content": [{"video": ["a.png"], "fps": 0}]}, "fps is 0"),
    "no frames": ({"content": [{"video": []}]}, "a video is a list of 0 frames"),
    "video": ({"content": [{"video": 3}]}, "a video is of type int"),
    "lost video": ({"content": [{"video": "a.mp4"}]}, "a.mp4 cannot be read"),
    "picture": ({"content": [{"image": 3}]}, "a picture is of type int"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_rows(case: str, tmp_path: Path) -> None:
    row, message = WRONG[case]
    samples = open_samples([lines(tmp_path / "a.jsonl", {"text": "fine"}, row)])
    samples.key(1)  # naming a sample never fails
    with pytest.raises(HerdError, match=message) as caught:
        _ = samples[1]
    assert f"{tmp_path / 'a.jsonl'} line 2" in str(caught.value)
    assert "\n" not in str(caught.value)


# --- sources

def test_tar_shards(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", {
        "./a/1.png": png("red"), "a/1.txt": b"a red square",
        "a/2.jpg": png(), "a/2.json": b'{"text": "<|image|> here"}',
        "a/3.0.png": png("red"), "a/3.1.png": png("blue"),
        "a/3.json": b'{"content": [{"image": "1.png"}, "then", {"image": "a/3.0.png"}]}'})
    samples = open_samples([path])
    assert [samples.key(i) for i in range(3)] == ["a/1", "a/2", "a/3"]
    assert samples[0].document == (Picture(png("red")), "a red square")
    assert samples[1].document == (Picture(png()), " here")
    assert samples[2].document == (Picture(png("blue")), "then", Picture(png("red")))


@pytest.mark.parametrize(("members", "message"), [
    ({"a.json": b"{"}, "sample a cannot be read as JSON"),
    ({"a.txt": b"\xff"}, "not UTF-8"),
    ({"a.json": b'{"image": "b.png"}', "a.png": b""}, r"names the picture b\.png, it has png"),
    ({"a.cls": b"3"}, "neither text"),
    ({"a.json": b'{"messages": 3}'}, "messages is not a list"),
])
def test_wrong_tar_samples(members: dict[str, bytes], message: str, tmp_path: Path) -> None:
    with pytest.raises(HerdError, match=message):
        only(shard(tmp_path / "a.tar", members))


def test_wrong_tar_files(tmp_path: Path) -> None:
    packed = shard(tmp_path / "a.tar", {"a.txt": b"a"}, "w:gz")
    with pytest.raises(HerdError, match="uncompressed tar"):
        open_samples([packed])
    whole = shard(tmp_path / "b.tar", {"a.txt": b"a" * 5000}).read_bytes()
    (tmp_path / "b.tar").write_bytes(whole[:1500])
    with pytest.raises(HerdError, match=r"b\.tar"):
        open_samples([tmp_path / "b.tar"])


class _Rows(list[Any]):
    column_names = ("key", "text")

    def __getitem__(self, index: Any) -> Any:
        if index == "key":
            return [row["key"] for row in self]
        row = list.__getitem__(self, index)
        if row["text"] == "broken":
            raise OSError("cannot identify image file")
        return row


def test_saved_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dataset_info.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(HerdError, match="pip install datasets"):
        open_samples([tmp_path])
    rows = _Rows([{"key": "one", "text": "moo", "images": None}, {"key": "two", "text": "broken"}])
    found: dict[str, Any] = {"train": rows}
    fake = SimpleNamespace(DatasetDict=dict, load_from_disk=lambda _: found)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    samples = open_samples([tmp_path])
    assert (samples[0].document, samples.key(0)) == (("moo",), "one")
    with pytest.raises(HerdError, match="row 1 cannot be read: cannot identify"):
        _ = samples[1]
    found["test"] = found.pop("train")
    with pytest.raises(HerdError, match="has splits test and no train"):
        open_samples([tmp_path])


def test_directories_join_their_files(tmp_path: Path) -> None:
    lines(tmp_path / "b.jsonl", {"text": "second"}, {"text": "third"})
    shard(tmp_path / "a.tar", {"x.txt": b"first"})
    samples = open_samples([tmp_path, tmp_path / "b.jsonl"])
    assert [samples[i].document[0] for i in range(len(samples))] == ["first", "second", "third", "second", "third"]
    assert samples.key(1) == samples.key(3) != samples.key(2)


def test_texts_and_pictures(tmp_path: Path) -> None:
    """A text is one document, whatever its length; pictures stand for themselves where no rows speak of them."""
    text = "The herd grazes.\n\n" * 100
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.md").write_text(text)
    for name in ("two.png", "one.JPG"):
        picture(tmp_path / "pictures" / name)
    samples = open_samples([tmp_path / "a.txt", tmp_path / "pictures", tmp_path / "pictures" / "two.png"])
    one, two = ((Picture(tmp_path / "pictures" / name),) for name in ("one.JPG", "two.png"))
    assert [samples[i].document for i in range(len(samples))] == [(text,), one, two, two]
    assert [samples.key(i) for i in range(1, 4)] == ["one.JPG", "two.png", "two.png"]
    assert samples.key(0) == samples[0].key == open_samples([tmp_path / "b.md"]).key(0), "the same text"
    lines(tmp_path / "pictures" / "rows.jsonl", {"text": "a cow", "image": "one.JPG"})
    assert only(tmp_path / "pictures").document == (*one, "a cow")


def test_nothing_to_read(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "empty.tar").write_text("")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "a.csv").write_text("a")
    (tmp_path / "folder").mkdir()
    for name, message in {"empty.jsonl": "is empty", "empty.tar": "is empty", "empty.txt": "is empty",
                          "a.csv": r"is a \.csv file", "folder": r"holds no \.jsonl, \.tar or \.txt files, no pictures",
                          "none": "does not exist"}.items():
        with pytest.raises(HerdError, match=message):
            open_samples([tmp_path / name])
    with pytest.raises(HerdError, match=r"there is no data: give a text, a \.jsonl or \.tar file"):
        open_samples([])


def test_files_that_vanish(tmp_path: Path) -> None:
    samples = open_samples([lines(tmp_path / "a.jsonl", {"text": "moo"})])
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(HerdError, match=r"a\.jsonl cannot be read: No such file"):
        _ = samples[0]


def test_held_out_by_key(tmp_path: Path) -> None:
    rows = [{"text": f"sample {i % 900}"} for i in range(1000)]
    samples = open_samples([lines(tmp_path / "a.jsonl", *rows)])
    train, held = hold_out(samples, 0.1)
    assert len(train) + len(held) == 1000
    assert 60 < len(held) < 140
    keys = [{part.key(i) for i in range(len(part))} for part in (train, held)]
    assert not keys[0] & keys[1]
    assert len(keys[0] | keys[1]) == 900
    again, _ = hold_out(open_samples([lines(tmp_path / "b.jsonl", *reversed(rows))]), 0.1)
    assert {again.key(i) for i in range(len(again))} == keys[0]


# --- tokens

def test_all_text_of_a_document_is_learned(files: Path, tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    record = only(lines(tmp_path / "a.jsonl", {"content": ["A <|eot|>", {"image": "a.png"}, "B"]}))
    encoded = encoder(files)(record)
    assert text_of(encoded, files) == ("<|begin_of_text|>A <|eot|><|image_start|><|image|>" + "<|patch|>" * 4
                                       + "<|image_end|>B<|end_of_text|>")
    assert 508 not in encoded.ids_T  # what a text says is never a special token
    assert text_of(encoded, files, encoded.learned_T) == "A <|eot|>B<|end_of_text|>"
    assert encoded.tiles_NCHW is not None
    assert encoded.tiles_NCHW.shape == (1, 3, 28, 28)


def test_only_the_assistant_is_learned(files: Path, tmp_path: Path) -> None:
    row = {"messages": [*CHAT, {"role": "user", "content": "bye"}]}
    encoded = encoder(files)(only(lines(tmp_path / "a.jsonl", row)))
    assert text_of(encoded, files, encoded.learned_T) == "moo<|eot|>moo moo<|eot|>"
    assert text_of(encoded, files).endswith("assistant<|header_end|>\n\nmoo moo<|eot|>")


def test_pictures_of_conversations(files: Path, tmp_path: Path) -> None:
    wide = picture(tmp_path / "a.png", (56, 28))
    messages = [{"role": "user", "content": [{"image": str(wide)}, "left <|image|>"]}, CHAT[1]]
    found = encoder(files)(only(lines(tmp_path / "a.jsonl", {"messages": messages})))
    patches, text = "<|patch|>" * 4, text_of(found, files)
    assert (f"user<|header_end|>\n\n<|image_start|>{patches}<|tile_x_separator|>{patches}<|tile_y_separator|><|image|>"
            f"{patches}<|image_end|>left <|image|><|eot|>") in text
    assert found.tiles_NCHW is not None
    assert len(found.tiles_NCHW) == 3


def test_frames_have_one_tile(files: Path, tmp_path: Path) -> None:
    for name in ("f0.png", "f1.png"):
        picture(tmp_path / name, (112, 56))
    found = encoder(files)(only(lines(tmp_path / "a.jsonl", {"content": [{"video": ["f0.png", "f1.png"]}, "moo"]})))
    assert found.tiles_NCHW is not None
    assert len(found.tiles_NCHW) == 2
    frame = "<|image_start|><|image|>" + "<|patch|>" * 4 + "<|image_end|>"
    assert text_of(found, files) == f"<|begin_of_text|>Time: 0.0s{frame}Time: 0.5s{frame}moo<|end_of_text|>"
    assert np.all(found.tiles_NCHW[:, :, 20:] == -1)  # the aspect is kept: black below


def test_long_samples(files: Path, tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    record = only(lines(tmp_path / "a.jsonl", {"content": ["ab", {"image": "a.png"}, "cdef"]}))
    assert len(encoder(files, max_tokens=15)(record)) == 15
    with pytest.raises(HerdError, match="line 1: the sample has 15 tokens, at most 14"):
        encoder(files, max_tokens=14)(record)
    cut = encoder(files, max_tokens=12, too_long="cut")(record)
    assert cut.is_cut
    assert len(cut) == 12
    inside = encoder(files, max_tokens=9, too_long="cut")(record)  # not even the picture fits: it goes as a whole
    assert text_of(inside, files) == "<|begin_of_text|>ab"
    assert inside.tiles_NCHW is None


@pytest.mark.parametrize(("row", "message"), [
    ({"images": ["broken.png"]}, r"broken\.png is not an image"),
    ({"images": ["empty.png"]}, r"empty\.png is not an image"),
    ({"images": ["none.png"]}, "cannot be read"),
    ({"messages": CHAT[:1]}, "no message of the assistant"),
    ({"messages": [{"role": "boss", "content": "a"}]}, "has role 'boss'"),
])
def test_samples_that_cannot_be_learned(row: Any, message: str, files: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_text("no picture")
    (tmp_path / "empty.png").write_text("")
    with pytest.raises(HerdError, match=message) as caught:
        encoder(files)(only(lines(tmp_path / "a.jsonl", row)))
    assert str(caught.value).startswith(f"{tmp_path / 'a.jsonl'} line 1: ")


def test_what_is_too_long_is_refused_before_it_becomes_tokens(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = encoder(files)
    assert encode.processor.has_template, "read before reading text is forbidden"
    monkeypatch.setattr(encode.processor.tokenizer, "encode", None)
    turns = (Turn("user", ("x" * 100_000,), {}), Turn("assistant", ("y",), {}))
    for record in (Record("a", "a", document=("x" * 100_000,)), Record("a", "a", turns=turns)):
        with pytest.raises(HerdError, match=r"a: the text has 100\d+ characters, .* at most 200 are taken"):
            encode(record)


def test_models_that_only_read(files: Path, tmp_path: Path) -> None:
    reading = Encoder(files, HerdConfig(text=TINY.text), max_tokens=99)
    assert len(reading(only(lines(tmp_path / "a.jsonl", {"text": "moo"})))) == 5
    picture(tmp_path / "a.png")
    with pytest.raises(HerdError, match="reads text only"):
        reading(only(lines(tmp_path / "a.jsonl", {"image": "a.png"})))


def test_templates_that_hide_the_assistant(files: Path, tmp_path: Path) -> None:
    herds.write_processor(tmp_path)
    record = only(lines(tmp_path / "a.jsonl", {"messages": CHAT}))
    for template, message in (("{{ messages | length }} {{ messages[0].content }}", "rewrites earlier turns"),
                              ("{% for m in messages %}{{ m.content }}{% endfor %}", "with a stop token")):
        (tmp_path / "chat_template.jinja").write_text(template)
        with pytest.raises(HerdError, match=message):
            encoder(tmp_path)(record)


def test_text_must_fit_somewhere(files: Path, tmp_path: Path) -> None:
    record = only(lines(tmp_path / "a.jsonl", {"images": ["a.png"], "text": "moo"}))
    picture(tmp_path / "a.png")
    with pytest.raises(HerdError, match="there is nothing to learn"):
        encoder(files, max_tokens=8, too_long="cut")(record)
    assert replace(record, document=("moo",)).turns == ()
