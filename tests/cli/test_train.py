"""herdgraph train: options by name, one line for what is wrong, and a model at the end."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from herdgraph.cli import main
from herdgraph.cli.train import RUNS, parse_options
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.config.presets import TINY
from herdgraph.model.training.runs import TRAINING_RUNS
from support import herds


def train(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["train", *map(str, arguments)])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("train")
    herds.save(TINY, directory / "checkpoint")
    herds.write_processor(directory / "checkpoint")
    rows = [{"text": f"The herd of {number} grazes on the green hill. "} for number in range(40)]
    (directory / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return directory / "checkpoint", directory / "data.jsonl"


def arguments(files: tuple[Path, Path], output: Path) -> tuple[object, ...]:
    return ("pretrain", "--checkpoint", files[0], "--data", files[1], "--output", output, "--rows", 2, "--seq-len", 64,
            "--train.steps", 3, "--train.log-every", 2, "--optimizer.learning-rate", "1e-3", "--held-out", 0.2)


def test_a_run_from_the_command_line(files: tuple[Path, Path], tmp_path: Path) -> None:
    done = train(*arguments(files, tmp_path / "run"), "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["steps"] == 3
    assert found["held_out"] > 0
    with open_checkpoint(Path(found["model"])) as checkpoint:
        assert checkpoint.config == TINY
    again = train(*arguments(files, tmp_path / "run"))
    assert again.exit_code == 0
    assert "trained" in again.output


def test_without_a_terminal_progress_is_lines(files: tuple[Path, Path], tmp_path: Path) -> None:
    """A real process whose output is a pipe says on standard error where it stands, while it runs."""
    command = [sys.executable, "-m", "herdgraph", "train", *map(str, arguments(files, tmp_path / "run"))]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        first = next(line for line in process.stderr if line.startswith("step "))
        assert process.poll() is None, "it was said before the end"
        rest = [line for line in process.stderr if line.startswith("step ")]
    assert process.returncode == 0
    shown = re.compile(r"step (\d)/3  loss \d+\.\d{4}  \d+ tokens/s  ends \d\d:\d\d:\d\d, in \d+ s\n")
    assert [shown.fullmatch(line)[1] for line in (first, *rest)] == ["1", "2", "3"]


GIVEN = ["--data", "a", "--output", "o", "--checkpoint", "c"]


@pytest.mark.parametrize(("words", "message"), [
    ([*GIVEN, "nonsense"], "Unrecognized options: nonsense."),
    ([*GIVEN, "--train.stepz", "3"], "Unrecognized options: --train.stepz, 3: did you mean --train.steps?"),
    ([*GIVEN, "--rows", "many"], "Error parsing --rows: invalid literal for int() with base 10: 'many'."),
    ([*GIVEN, "--broken", "ignore"],
     "invalid choice 'ignore' for argument '--broken'. Expected one of ('stop', 'skip')."),
    ([*GIVEN, "--optimizer.betas", "0.9"], "Missing value for argument '--optimizer.betas'. Expected 2 values."),
    ([], "--data, --output, --checkpoint must be given."),
])
def test_wrong_options_are_one_line(words: list[str], message: str) -> None:
    done = train("pretrain", *words)
    assert done.exit_code == 2
    assert done.output == f"error: {message} See main train pretrain --help.\n"


@pytest.mark.parametrize("run", RUNS)
def test_help_lists_the_options(run: str) -> None:
    done = train(run, "--help")
    assert done.exit_code == 0
    for text in ("--output", "(required)", "--train.steps", "--optimizer.learning-rate", "optimizer options"):
        assert text in done.output


def test_help_of_the_group_lists_the_runs() -> None:
    assert {name.replace("-", "_") for name in RUNS} == set(TRAINING_RUNS)
    done = train("--help")
    assert done.exit_code == 0
    assert all(name in done.output for name in RUNS)


def test_values_become_what_they_are() -> None:
    kind = TRAINING_RUNS["distil"][1]
    words = ("--data", "a", "b", "c", "--output", "o", "--checkpoint", "s", "--teacher", "None", "--weighting", "fixed",
             "--soft", "0.5", "--optimizer.betas", "0.8", "0.9", "--optimizer.base-width", "64", "--train.recompute")
    found = parse_options(kind, words, "train distil")
    assert found.data == (Path("a"), Path("b"), Path("c"))
    assert found.teacher is None
    assert found.optimizer.betas == (0.8, 0.9)
    assert found.optimizer.base_width == 64
    assert found.train.recompute is True
    with pytest.raises(click.UsageError, match="invalid choice 'magic'"):
        parse_options(kind, (*words, "--weighting", "magic"), "train distil")
