"""The example application: the same answers as without reading the document once, and type checkers follow it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest

from examples.answer_questions import answers, messages
from herdgraph.export.pipeline import build_bundle
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.config.presets import TINY
from herdgraph.runtimes import Engine
from support import herds

ROOT = Path(__file__).parents[2]


def test_answers_equal_those_of_separate_runs(tmp_path: Path) -> None:
    herds.save(TINY, tmp_path / "checkpoint")
    herds.write_processor(tmp_path / "checkpoint")
    with open_checkpoint(tmp_path / "checkpoint") as checkpoint:
        build_bundle(checkpoint, tmp_path / "bundle")
    document, questions = "The calf eats grass.", ["What does it eat?", "Who eats?"]
    with Engine.load(tmp_path / "bundle", threads=1) as engine:
        found = list(answers(engine, document, questions))
        apart = [engine.generate(messages(document, one), max_new_tokens=64, temperature=0).text for one in questions]
    assert [answer.answer for answer in found] == [text.strip() for text in apart]
    assert all(0 < answer.confidence <= 1 for answer in found)


@pytest.mark.slow  # mypy and pyright over all that is imported
@pytest.mark.parametrize("kind", ["editable", "wheel"])
def test_type_checkers_follow_an_installation(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """mypy --strict accepts the application and finds a misspelt option, for an editable install and for a wheel."""
    site = _environment(tmp_path / "env")
    with ZipFile(_editable_wheel(tmp_path)) as archive:
        archive.extractall(site)
    if kind == "wheel":
        (site / "herdgraph.pth").unlink()
        shutil.copytree(ROOT, site / "herdgraph", ignore=shutil.ignore_patterns(
            ".*", "tests", "benchmarks", "docs", "examples", "tools", "build", "*.egg-info"))
    good, bad = tmp_path / "good.py", tmp_path / "bad.py"
    shutil.copyfile(ROOT / "examples" / "answer_questions.py", good)
    bad.write_text(good.read_text(encoding="utf-8").replace("max_new_tokens=64", 'max_new_tokns=64, top_k="x"'))
    python = tmp_path / "env" / "bin" / "python"
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--python-executable", python]
    done = subprocess.run([*command, good, bad], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert [line for line in done.stdout.splitlines() if "error: " in line and "good.py" in line] == []
    assert 'Unexpected keyword argument "max_new_tokns"' in done.stdout
    assert 'Argument "top_k"' in done.stdout


def _environment(directory: Path) -> Path:
    venv.create(directory)
    return next(directory.glob("lib/python*/site-packages"))


def _editable_wheel(directory: Path) -> Path:
    program = "import sys; sys.path.insert(0, 'tools'); import build_backend as b; print(b.build_editable(sys.argv[1]))"
    command = [sys.executable, "-c", program, directory]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return directory / done.stdout.splitlines()[-1]
