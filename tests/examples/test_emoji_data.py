"""Emoji as data, from a package made here: no network."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from examples.calf.captions import view, write_calf_data
from examples.calf.config import IMAGE_SIZE, calf_config
from examples.calf.emoji import VERSION, Emoji, fetch_emoji, read_emoji
from examples.calf.tokenizer import save_processor, train_tokenizer
from herdgraph.errors import HerdError
from herdgraph.model.data import open_samples
from herdgraph.model.training.data import Encoder, Loader

ANIMALS = ["COW FACE", "OX", "WATER BUFFALO", "SHEEP", "RAM", "GOAT", "PIG", "BOAR", "HORSE", "DONKEY", "UNICORN FACE",
           "ELEPHANT"]
NAMES: list[dict[str, Any]] = [
    *({"name": name, "category": "Animals & Nature", "subcategory": "animal-mammal"} for name in ANIMALS),
    {"name": "Norway Flag", "short_names": ["flag-no"], "category": "Flags"},
    {"name": "Bouvet Island Flag", "short_names": ["flag-bv"], "category": "Flags", "same": "Norway Flag"},
    {"name": "BLACK SCISSORS", "short_names": ["scissors"], "category": "Objects"},
    {"name": "CLOCKWISE RIGHTWARDS AND LEFTWARDS ARROWS", "short_names": ["repeat"], "category": "Symbols"},
    {"name": "WOMAN: RED HAIR", "short_names": ["red_haired_woman", "redhead"], "category": "People & Body"},
    {"name": "EMOJI MODIFIER", "category": "Component"},
    {"name": "FAMILY: MAN, BOY", "category": "People & Body"},
    {"name": "SQUARED CJK UNIFIED IDEOGRAPH-7121", "category": "Symbols"},
    {"name": "NO PICTURE", "category": "Symbols", "has_img_google": False, "has_img_twitter": False},
]


def package(directory: Path, vendor: str) -> Path:
    """Drawings that differ by name and vendor."""
    rows = []
    pictures = directory / "img" / vendor / "64"
    pictures.mkdir(parents=True)
    for number, given in enumerate(NAMES):
        code = f"1F{number:03X}"
        short = given["name"].lower().replace(" ", "_")
        rows.append({"unified": code, "image": f"{code.lower()}.png", "short_name": short, "short_names": [short],
                     "subcategory": "thing", **given})
        random = Random(f"{vendor} {given.get('same', given['name'])}")
        image = Image.new("RGBA", (64, 64))
        ImageDraw.Draw(image).ellipse((8, 8, 56, 40), fill=tuple(random.randrange(256) for _ in range(3)))
        image.save(pictures / f"{code.lower()}.png")
    (directory / "emoji.json").write_text(json.dumps(rows))
    (directory / "LICENSE").write_text("MIT")
    return directory


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Emoji]]:
    root = tmp_path_factory.mktemp("emoji")
    return {vendor: read_emoji(package(root / vendor, vendor), vendor) for vendor in ("google", "twitter")}


@pytest.fixture(scope="module")
def made(drawings: dict[str, list[Emoji]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    directory = tmp_path_factory.mktemp("calf") / "data"
    counts = write_calf_data(directory, {"google": drawings["google"]}, drawings["twitter"],
                             prose={"p": "A cow is large. " * 100}, views=8, held_out=0.3)
    return directory, counts


def rows(directory: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / f"{name}.jsonl").read_text().splitlines()]


def test_names(drawings: dict[str, list[Emoji]]) -> None:
    by_name = {emoji.name: emoji for emoji in drawings["google"]}
    assert set(by_name) == {*map(str.lower, ANIMALS), "flag of Norway", "black scissors", "repeat", "red haired woman"}
    phrases = ("cow face", "ox", "unicorn face", "flag of Norway", "black scissors")
    assert [by_name[name].phrase for name in phrases] == [
        "a cow face", "an ox", "a unicorn face", "the flag of Norway", "black scissors"]
    assert by_name["black scissors"].aliases == ("scissors",)
    assert by_name["red haired woman"].aliases == ("redhead",)
    assert by_name["flag of Norway"].aliases == ()
    assert by_name["ox"].category == "animals and nature"
    assert by_name["ox"].kind == "animal mammal"


def test_held_out_emoji_are_never_shown(made: tuple[Path, dict[str, int]], drawings: dict[str, list[Emoji]]) -> None:
    directory, counts = made
    held = {emoji.code: emoji for emoji in drawings["google"] if emoji.is_held_out(0.3)}
    assert 0 < len(held) == counts["emoji_held_out"] == counts["held_out"]
    assert counts["seen"] == counts["other_vendor"] == counts["emoji_trained"] == len(drawings["google"]) - len(held)
    assert counts["train"] == 8 * counts["emoji_trained"]
    assert counts["views"] == 2 * counts["emoji_trained"]
    views = {name: {row["key"] for row in rows(directory, name)} for name in ("train", "views")}
    assert not views["train"] & views["views"]
    assert {key[-1] for key in views["views"]} == {"8", "9"}
    assert json.loads((directory / "counts.json").read_text()) == counts
    training = "".join((directory / f"{name}.jsonl").read_text() for name in ("train", "views"))
    text = (directory / "text.jsonl").read_text().lower()
    for emoji in held.values():
        assert f"{emoji.code}-" not in training
        assert emoji.name.lower() in text
    assert {row["key"].split("-")[0] for row in rows(directory, "held_out")} == set(held)
    assert not {row["key"].split("-")[0] for row in rows(directory, "other_vendor")} & set(held)


def test_rows_to_evaluate_on(made: tuple[Path, dict[str, int]], drawings: dict[str, list[Emoji]]) -> None:
    directory, _ = made
    twitter = {emoji.code: emoji for emoji in drawings["twitter"]}
    for row in rows(directory, "other_vendor"):
        emoji = twitter[row["key"].split("-")[0]]
        assert (row["name"], row["category"]) == (emoji.name, emoji.category)
        question, answer = row["messages"]
        assert question["content"][1]["text"] == "What is this?"
        assert answer["content"].lower() == f"{emoji.phrase.lower()}."
        with Image.open(directory / question["content"][0]["image"]) as shown:
            assert np.array_equal(np.asarray(shown), np.asarray(view(emoji.picture)))


def test_views(drawings: dict[str, list[Emoji]]) -> None:
    picture = drawings["google"][0].picture
    assert view(picture).getpixel((0, 0)) == (255, 255, 255)
    one, same, other = (np.asarray(view(picture, Random(seed))) for seed in (1, 1, 2))
    assert one.shape == (64, 64, 3)
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_the_same_seed_writes_the_same(made: tuple[Path, dict[str, int]], drawings: dict[str, list[Emoji]],
                                       tmp_path: Path) -> None:
    write_calf_data(tmp_path / "again", {"google": drawings["google"]}, drawings["twitter"],
                    prose={"p": "A cow is large. " * 100}, views=8, held_out=0.3)
    for path in made[0].rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(made[0])).read_bytes()


def test_every_row_is_learned_from(made: tuple[Path, dict[str, int]], tmp_path: Path) -> None:
    """Through the reader, the calf's own processor with its small tiles, packing and loader."""
    directory, counts = made
    save_processor(tmp_path / "files", train_tokenizer(["A picture of a cow. " * 20], 320), image_size=IMAGE_SIZE)
    encoder = Encoder(tmp_path / "files", calf_config(320), max_tokens=512, too_long="cut")
    per_tile = calf_config(320).vision.tokens_per_tile
    for name in ("train", "views", "text", "seen", "held_out", "other_vendor", "other_held_out"):
        samples = open_samples([directory / f"{name}.jsonl"])
        loader = Loader(samples, encoder, rows=2, seq_len=512, epochs=1)
        batches = list(loader)
        assert loader.counts["used"] == counts[name]
        patches = sum(int((batch.input_ids_BT == calf_config(320).image_token_id).sum()) for batch in batches)
        assert patches == per_tile * sum(len(batch.pixels_NCHW) for batch in batches if batch.pixels_NCHW is not None)
        assert (patches > 0) == (name != "text")


def test_nothing_to_split(drawings: dict[str, list[Emoji]], tmp_path: Path) -> None:
    with pytest.raises(HerdError, match="0 held-out"):
        write_calf_data(tmp_path / "a", {"google": drawings["google"]}, drawings["twitter"], held_out=0)
    assert not (tmp_path / "a").exists()
    with pytest.raises(HerdError, match="holds no pictures of apple"):
        read_emoji(package(tmp_path / "b", "google"), "apple")
    (tmp_path / "b" / "emoji.json").write_text("{")
    with pytest.raises(HerdError, match="remove its directory to fetch it again"):
        read_emoji(tmp_path / "b", "google")


def npm(directory: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An npm of our own at the only place where commands are found."""
    directory.mkdir(exist_ok=True)
    program = directory / "npm"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:/bin:/usr/bin")


def test_fetching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path / "package", "google")
    with tarfile.open(tmp_path / "emoji.tgz", "w:gz") as archive:
        archive.add(tmp_path / "package", "package")
    npm(tmp_path / "bin", f"cp '{tmp_path}/emoji.tgz' \"$5/$(basename $2).tgz\"", monkeypatch)
    found = fetch_emoji("google", tmp_path / "cache")
    assert found == tmp_path / "cache" / f"emoji-google-{VERSION}"
    assert len(read_emoji(found, "google")) == len(ANIMALS) + 4
    npm(tmp_path / "bin", "exit 1", monkeypatch)
    assert fetch_emoji("google", tmp_path / "cache") == found  # what is there is not fetched
    shutil.rmtree(found)
    npm(tmp_path / "bin", "echo npm ERR code ENOTFOUND >&2; exit 1", monkeypatch)
    with pytest.raises(HerdError, match=r"could not fetch emoji-datasource-google@.* ENOTFOUND"):
        fetch_emoji("google", tmp_path / "cache")
    npm(tmp_path / "bin", "echo nonsense > $5/a.tgz", monkeypatch)
    with pytest.raises(HerdError, match=r"a\.tgz is damaged"):
        fetch_emoji("google", tmp_path / "cache")
    assert not found.exists()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(HerdError, match="npm is needed"):
        fetch_emoji("google", tmp_path / "cache")
