"""Models by name, numbers of tokens, and what inspect shows beyond files."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest

from herdgraph.model.config.parameter_counts import model_size
from herdgraph.model.config.presets import MAVERICK, PRESETS
from herdgraph.options import TokenCount
from support.command_line import run


@pytest.mark.parametrize("name", ["maverick", "meta-llama/Llama-4-Maverick-17B-128E",
                                  "Llama-4-Maverick-17B-128E-Instruct"])
def test_a_preset_is_inspected(name: str) -> None:
    document = json.loads(run("inspect", name, "--json").stdout)
    assert (document["preset"], document["facts"]) == (name, model_size(MAVERICK).to_json())
    assert run("inspect", name).stdout.startswith(f"{name} (a configuration, no weights)\nparameters")


def test_the_calf_is_planned_and_inspected() -> None:
    assert "calf" in run("plan", "calf", "--devices", "1x80GB", "--context", 512).stdout
    assert json.loads(run("inspect", "calf", "--json").stdout)["files"]


def test_a_preset_has_no_weights() -> None:
    assert "scout is a configuration without weights" in run("build", "scout", "-o", "x").stderr


def test_a_directory_comes_before_a_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert "tiny holds neither config.json" in run("inspect", "tiny").stderr
    assert "tiny" in PRESETS


@pytest.mark.parametrize("command", [("build", "-o", "x"), ("calibrate", "-o", "x"), ("inspect",)])
def test_a_gguf_file_is_sent_to_upcycle(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.gguf").touch()
    done = run(command[0], "a.gguf", *command[1:])
    assert done.stderr.splitlines()[-1] == (
        "error: a.gguf is not a directory: make a checkpoint of it with `herdgraph upcycle`")


def test_a_bundle_shows_its_caches_and_its_sampling(paths: tuple[Path, Path]) -> None:
    shown = dict(line.split("  ", 1) for line in run("inspect", paths[1]).stdout.splitlines() if "  " in line)
    assert shown["KV cache (float32)"].strip().startswith("256 B per token global, 768 B local")
    assert shown["sampling"].strip() == "greedy"
    assert "KV cache (at 16 bit)" in run("inspect", paths[0]).stdout


@pytest.mark.parametrize(("text", "count"), [("4096", 4096), ("128k", 131072), ("1m", 1048576), ("10M", 10485760)])
def test_numbers_of_tokens(text: str, count: int) -> None:
    assert TokenCount().convert(text, None, None) == count


@pytest.mark.parametrize("text", ["", "k", "1x", "-1", "1.5k", "²", "8"])
def test_no_numbers_of_tokens(text: str) -> None:
    with pytest.raises(click.BadParameter):
        TokenCount(16).convert(text, None, None)
