"""What is wrong with the data of a run: one line that says where and what to do, as somebody at a terminal sees it."""

from __future__ import annotations

import io
import json
import logging
import resource
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from herdgraph.cli import main
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.config import read_config
from herdgraph.model.config.presets import TINY
from herdgraph.model.data import JsonLines
from herdgraph.model.training.data import Encoder
from herdgraph.model.training.distill import CacheSpec, CacheWriter
from support import herds

PROSE = [{"text": f"The herd of {number} grazes on the green hill."} for number in range(12)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bad") / "checkpoint"
    herds.save(TINY, directory)
    herds.write_processor(directory)
    return directory


def train(checkpoint: Path, data: Path, *options: str, recipe: str = "pretrain") -> Result:
    given = {"checkpoint": checkpoint, "data": data, "output": data.parent / "run", "rows": 2, "seq_len": 64,
             "train.steps": 2, "held_out": 0} | dict(option.split("=", 1) for option in options)
    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return CliRunner().invoke(main, ["train", recipe, *words])


def refused(done: Result) -> str:
    """The one line that was printed."""
    assert done.exit_code == 1, done.output
    [line] = [line for line in done.output.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in done.output
    return line.removeprefix("error: ")


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def shard(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def broken_pictures(directory: Path) -> list[dict[str, Any]]:
    """Rows with a picture that is none, one that ends too early, and one that is not there."""
    Image.new("RGB", (28, 28), "green").save(directory / "whole.png")
    whole = (directory / "whole.png").read_bytes()
    (directory / "cut.png").write_bytes(whole[: len(whole) // 2])
    (directory / "none.png").write_text("no picture")
    return [{"text": "<|image|>a hill", "images": [name]} for name in ("none.png", "cut.png", "missing.png")]


SKIP = "; correct it, or choose to skip broken samples"
PICTURES = ["none.png is not an image in a format that is read here: PNG, JPEG, WEBP, GIF, BMP, TIFF, PPM, ICO",
            "cut.png is a broken or unsafe image: image file is truncated",
            "missing.png cannot be read: No such file or directory"]


@pytest.mark.parametrize("number", range(3))
def test_a_broken_picture_stops_a_run(number: int, checkpoint: Path, tmp_path: Path) -> None:
    data = lines(tmp_path / "data.jsonl", *PROSE, broken_pictures(tmp_path)[number])
    message = refused(train(checkpoint, data, "train.steps=20"))
    assert message.startswith(f"{data} line 13: ")
    assert message.endswith(f"{tmp_path}/{PICTURES[number]}{SKIP}")


def test_skipped_samples_are_logged_and_counted(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = lines(tmp_path / "data.jsonl", *PROSE, *broken_pictures(tmp_path), '{"text": "The he')
    with caplog.at_level(logging.WARNING):
        done = train(checkpoint, data, "broken=skip", "rows=1", "train.steps=16", "train.log_every=4")
    assert done.exit_code == 0, done.output
    for number in range(3):
        assert any(f"{data} line {13 + number}: " in text and PICTURES[number] in text for text in caplog.messages)
    assert any(f"{data} line 16 cannot be read as JSON: Unterminated string" in text for text in caplog.messages)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["samples/skipped"] == sum(text.startswith("skipped a sample") for text in caplog.messages) >= 4
    assert records[0]["samples/skipped"] <= records[-1]["samples/skipped"]


def test_a_line_that_was_cut_off_stops_a_run(checkpoint: Path, tmp_path: Path) -> None:
    data = lines(tmp_path / "data.jsonl", *PROSE, '{"text": "The he')
    message = refused(train(checkpoint, data, "train.steps=20"))
    assert message == (f"{data} line 13 cannot be read as JSON: Unterminated string starting at: line 1 column 10 "
                       f"(char 9); each line has to be one JSON object{SKIP}")


def test_files_without_usable_samples(checkpoint: Path, tmp_path: Path) -> None:
    empty = lines(tmp_path / "empty.jsonl")
    assert refused(train(checkpoint, empty)) == f"{empty} is empty: it holds no samples"
    broken = lines(tmp_path / "broken.jsonl", *broken_pictures(tmp_path))
    message = refused(train(checkpoint, broken, "broken=skip"))
    assert message.startswith(f"none of the 3 samples can be used, the last because: {broken} line ")
    data = lines(tmp_path / "data.jsonl", *PROSE)
    assert refused(train(checkpoint, data, "held_out=1")) == (
        "all 12 samples are held out, none is left to train on: give more data, or less than held_out=1.0")
    assert refused(train(checkpoint, data, "held_out=1.5")) == "held_out is 1.5, it must be within 0 and 1"
    assert refused(train(checkpoint, data, "rows=0")) == "rows is 0, it must be at least 1"


def test_what_is_longer_than_a_row_is_cut_but_never_a_picture(checkpoint: Path, tmp_path: Path) -> None:
    broken_pictures(tmp_path)
    long = "The herd grazes on the green hill. " * 20
    data = lines(tmp_path / "data.jsonl", {"text": long + "<|image|>" + long, "images": ["whole.png"]},
                 {"text": "The herd<|image|>" + long, "images": ["whole.png"]})
    done = train(checkpoint, data, "seq_len=16", "train.log_every=1")
    assert done.exit_code == 0, done.output
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["samples/cut"] >= 4, "every one was longer"
    samples, config = JsonLines(data), read_config(checkpoint)
    for length in range(4, 40):  # wherever a row ends, a picture is there with all of its tokens or not at all
        sample = Encoder(checkpoint, config, max_tokens=length, too_long="cut")(samples[1])
        tiles = 0 if sample.tiles_NCHW is None else len(sample.tiles_NCHW)
        assert int((sample.ids_T == config.image_token_id).sum()) == tiles * config.vision.tokens_per_tile
        assert int((sample.ids_T == config.begin_image_token_id).sum()) == (tiles > 0)
        assert int((sample.ids_T == config.end_image_token_id).sum()) == (tiles > 0)


def test_rows_that_are_longer_than_the_context(checkpoint: Path, tmp_path: Path) -> None:
    data = lines(tmp_path / "data.jsonl", *PROSE)
    assert refused(train(checkpoint, data, "seq_len=4097")) == (
        "samples may have 4097 tokens, the model's context is 4096: take shorter rows, or raise the context first "
        "(herdgraph train long-context)")


def test_a_tar_file_reaches_nothing_outside_of_it(checkpoint: Path, tmp_path: Path) -> None:
    broken_pictures(tmp_path)
    picture = (tmp_path / "whole.png").read_bytes()
    for name in ("../whole.png", str(tmp_path / "whole.png")):
        row = json.dumps({"text": "<|image|>a hill", "images": [name]}).encode()
        message = refused(train(checkpoint, shard(tmp_path / "data.tar", {"a.json": row, "a.png": picture})))
        assert message == f"{tmp_path}/data.tar sample a names the picture {name}, it has png{SKIP}"
    with tarfile.open(tmp_path / "link.tar", "w") as archive:
        link = tarfile.TarInfo("a.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    assert refused(train(checkpoint, tmp_path / "link.tar")) == f"{tmp_path}/link.tar is empty: it holds no samples"
    before = set(tmp_path.parent.iterdir())
    done = train(checkpoint, shard(tmp_path / "up.tar", {"../up.txt": b"The herd grazes on the green hill."}))
    assert done.exit_code == 0, done.output
    assert set(tmp_path.parent.iterdir()) == before, "a member is read where it lies, never unpacked"


def test_teachers_that_do_not_fit(checkpoint: Path, tmp_path: Path) -> None:
    data = lines(tmp_path / "data.jsonl", *PROSE)
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "manifest.json").write_text("{}")
    with CacheWriter(tmp_path / "cache", CacheSpec(tokenizer="0" * 64, vocabulary=512), TINY):
        pass
    herds.save(TINY, tmp_path / "other")
    herds.write_processor(tmp_path / "other")
    tokenizer = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    tokenizer["added_tokens"][0]["content"] += "x"
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(tokenizer))
    message = {}
    for name in ("bundle", "cache", "other", "nothing"):
        message[name] = refused(train(checkpoint, data, f"teacher={tmp_path / name}", recipe="distil"))
    assert message["bundle"] == (
        f"{tmp_path}/bundle is a compiled bundle, --teacher takes a checkpoint or a cache: name the checkpoint that it "
        "was built from, or call distil(options, teacher=EngineTeacher(Engine.load(...))) from Python")
    theirs = "its ids mean other text; distil between models with the same tokenizer"
    assert message["cache"].startswith(f"the teacher of {tmp_path}/cache uses tokenizer 000000000000, the student ")
    assert message["cache"].endswith(theirs)
    assert message["other"].startswith("the teacher uses tokenizer ")
    assert message["other"].endswith(theirs)
    assert f"{tmp_path}/nothing" in message["nothing"]


def test_a_loss_that_is_no_number_names_step_and_layer(checkpoint: Path, tmp_path: Path) -> None:
    data = lines(tmp_path / "data.jsonl", *PROSE)
    message = refused(train(checkpoint, data, "optimizer.learning_rate=1e30", "optimizer.warmup=0", "train.steps=4"))
    assert message == (
        "step 2: the loss is nan; decoder.layers.0.self_attn.q_proj is the first to give values that are not finite; "
        "lower the learning rate, or continue from the last checkpoint with other data")


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file may grow beyond: as real an error of the system as that of a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_while_the_model_is_written(checkpoint: Path, tmp_path: Path) -> None:
    data = lines(tmp_path / "data.jsonl", *PROSE)
    model = tmp_path / "run" / "model"
    assert train(checkpoint, data).exit_code == 0
    with open_checkpoint(model) as written:
        before = written.fingerprint()
    with full_disk(100_000):
        message = refused(train(checkpoint, data))
    assert message.startswith(f"writing {model} failed: ")
    assert message.endswith("File too large (os error 27); nothing was left behind")
    with open_checkpoint(model) as written:
        assert written.fingerprint() == before, "the one before is whole"
    assert sorted(path.name for path in model.parent.iterdir()) == ["checkpoints", "metrics.jsonl", "model",
                                                                    "tensorboard"]
    assert train(checkpoint, data).exit_code == 0, "the run is in its last checkpoint"


def test_records_that_cannot_be_written(checkpoint: Path, tmp_path: Path) -> None:
    data = lines(tmp_path / "data.jsonl", *PROSE)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").symlink_to("/dev/full")
    message = refused(train(checkpoint, data))
    assert message == (f"{tmp_path}/run/metrics.jsonl cannot be written (No space left on device): make room or choose "
                       "another output; the run goes on from its last checkpoint")
    assert refused(train(checkpoint, data, f"output={data}")).startswith(f"{data} cannot be written (File exists)")
