"""The command line as a newcomer meets it: help, results, and one line for everything that is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import herds
import pytest
from herdgraph.model.presets import TINY
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[1]


def run(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "herdgraph", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, input=stdin, check=False)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("cli with spaces")
    checkpoint, bundle = directory / "checkpoint", directory / "bundle"
    herds.save(TINY, checkpoint)
    herds.write_processor(checkpoint)
    done = subprocess.run([sys.executable, ROOT / "build.py", checkpoint, "-o", bundle, "--json"],
                          capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["bundle"] == str(bundle)
    return checkpoint, bundle


@pytest.mark.parametrize("command", [[], ["build"], ["generate"], ["chat"], ["inspect"], ["verify"], ["upcycle"]])
def test_help(command: list[str]) -> None:
    done = run(*command, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: ")


def test_generate(paths: tuple[Path, Path], tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (60, 30), "green").save(tmp_path / "green.png")
    arguments = ("generate", paths[1], "-p", "Hi", "--image", tmp_path / "green.png", "--max-new-tokens", 5)
    streamed, document = run(*arguments), json.loads(run(*arguments, "--json").stdout)
    assert streamed.returncode == 0, streamed.stderr
    assert streamed.stdout.strip("\n") == document["text"].strip("\n")
    assert "prompt tokens" in streamed.stderr
    assert len(document["token_ids"]) <= 5


def test_chat(paths: tuple[Path, Path]) -> None:
    done = run("chat", paths[1], "--max-new-tokens", 3, stdin="hello\n/image nothing.png\nlook\nagain\n/reset\n/quit\n")
    assert done.returncode == 0, done.stderr
    assert "nothing.png" in done.stderr
    assert "Traceback" not in done.stderr


def test_inspect(paths: tuple[Path, Path]) -> None:
    for path in paths:
        document = json.loads(run("inspect", path, "--json").stdout)
        assert document["facts"]["total"] > document["facts"]["active"]
        assert document["files"]
        table = run("inspect", path)
        assert "top-1, plus a shared one" in table.stdout


def test_verify(paths: tuple[Path, Path]) -> None:
    checkpoint, bundle = paths
    document = json.loads(run("verify", bundle, checkpoint, "--tokens", 40, "--json").stdout)
    assert document["passed"]
    assert document["max_difference"] < 1e-4
    assert document["top1_agreement"] == 1
    failed = run("verify", bundle, checkpoint, "--bound", 1e-12)
    assert failed.returncode == 1
    assert "the bound is 1e-12" in failed.stderr


def test_verify_finds_a_wrong_weight(paths: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint, bundle = paths
    for path in checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.2.self_attn.v_proj.weight"))
    weights[name] = weights[name] + 0.05
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert run("verify", bundle, tmp_path).returncode == 1


def _text(path: Path) -> Path:
    path.write_text("not a picture")
    return path


WRONG = {
    "missing checkpoint": (lambda c, b, t: ("build", t / "none", "-o", t / "out"), "is not a directory"),
    "empty checkpoint": (lambda c, b, t: ("build", t, "-o", t / "out"), "neither config.json nor params.json"),
    "unknown target": (lambda c, b, t: ("build", c, "-o", t / "out", "--target", "abacus"), "no target is called"),
    "unknown recipe": (lambda c, b, t: ("build", c, "-o", t / "out", "--recipe", "int3"), "has no recipe 'int3'"),
    "output exists": (lambda c, b, t: ("build", c, "-o", b), "exists already"),
    "unwritable output": (lambda c, b, t: ("build", c, "-o", "/proc/none/out"), "cannot write to"),
    "not a bundle": (lambda c, b, t: ("generate", c, "-p", "x"), "not a herdgraph bundle"),
    "empty prompt": (lambda c, b, t: ("generate", b, "--raw", "-p", ""), "empty"),
    "bad temperature": (lambda c, b, t: ("generate", b, "-p", "x", "--temperature", "-1"), "temperature is -1"),
    "bad length": (lambda c, b, t: ("generate", b, "-p", "x", "--max-new-tokens", "0"), "max_new_tokens is 0"),
    "missing image": (lambda c, b, t: ("generate", b, "-p", "x", "--image", t / "none.png"), "none.png"),
    "not an image": (lambda c, b, t: ("generate", b, "-p", "x", "--image", _text(t / "a.png")), "a.png"),
    "long prompt": (lambda c, b, t: ("generate", b, "--raw", "-p", "x" * 5000), "4096"),
    "inspect nothing": (lambda c, b, t: ("inspect", t / "none"), "is not a directory"),
    "verify too short": (lambda c, b, t: ("verify", b, c, "--tokens", "1"), "--tokens is 1"),
    "upcycle nothing": (lambda c, b, t: ("upcycle", t / "none", "-o", t / "out"), "none"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_inputs_are_one_line(case: str, paths: tuple[Path, Path], tmp_path: Path) -> None:
    arguments, message = WRONG[case]
    done = run(*arguments(*paths, tmp_path))
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


def test_wrong_flags_are_clicks_own_error(paths: tuple[Path, Path]) -> None:
    done = run("generate", paths[1], "-p", "x", "--max-new-tokens", "many")
    assert done.returncode == 2
    assert "'many' is not a valid integer" in done.stderr


def test_dry_run(paths: tuple[Path, Path], tmp_path: Path) -> None:
    plan = json.loads(run("build", paths[0], "-o", tmp_path / "out", "--dry-run", "--json").stdout)
    assert plan["bundle_bytes"] == 4 * plan["parameters"]
    assert not (tmp_path / "out").exists()
