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
    assert "resuming" not in again.output
    assert again.output.splitlines()[-1] == (
        f"finished before: {tmp_path}/run/model has its 3 steps, nothing was trained now; for more give --train.steps "
        "above 3, for a new run another --output")
    more = train(*arguments(files, tmp_path / "run"), "--train.steps", 4)
    said = more.output.splitlines()
    assert re.fullmatch(r"data: \d\d samples to train on, \d+ held out, about \d{4} tokens", said[1])
    assert said[2:4] == [
        "steps: 4 of 2 rows of 64 tokens, about 0.4 epochs, in fp32",
        f"checkpoints: every 10 minutes and at the end, in {tmp_path}/run/checkpoints; the model at the end: "
        f"{tmp_path}/run/model"]
    assert said[4].startswith("resuming from step 3 of 4, saved ")
    assert said[-1].startswith(f"trained {tmp_path}/run/model: 4 steps, ")


def test_without_a_terminal_progress_is_lines(files: tuple[Path, Path], tmp_path: Path) -> None:
    """A real process whose output is a pipe says on standard error where it stands, while it runs."""
    command = [sys.executable, "-m", "herdgraph", "train", *map(str, arguments(files, tmp_path / "run"))]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        first = next(line for line in process.stderr if line.startswith("step "))
        assert process.poll() is None, "it was said before the end"
        rest = [line for line in process.stderr if line.startswith("step ")]
    assert process.returncode == 0
    shown = re.compile(r"step (\d)/3  loss \d+\.\d{4}  \d+ tokens/s(  ends \d\d:\d\d:\d\d, in \d+ s)?\n")
    assert [shown.fullmatch(line)[1] for line in (first, *rest)] == ["1", "2", "3"]


GIVEN = ["--data", "a", "--output", "o", "--checkpoint", "c"]


@pytest.mark.parametrize(("words", "message"), [
    ([*GIVEN, "nonsense"], "Unrecognized options: nonsense."),
    ([*GIVEN, "--train.stepz", "3"], "Unrecognized options: --train.stepz, 3: did you mean --train.steps?"),
    ([*GIVEN, "--lr", "3"], "Unrecognized options: --lr, 3: did you mean --optimizer.learning-rate?"),
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
    assert RUNS[run] in done.output


@pytest.mark.parametrize("run", RUNS)
def test_every_option_is_described(run: str) -> None:
    """tyro shows nothing but a default where a dataclass says nothing of a field."""
    shown = " ".join(line.strip("│╭╮╰╯─ ") for line in train(run, "--help").output.splitlines())
    options = re.split(r" (?=--[a-z])", shown)
    bare = [text for text in options if re.fullmatch(r"--[\w.-]+ [^ ]*( [A-Z.\[\]]+)* ?\((default|required).*", text)]
    assert len(options) > 25
    assert not bare


def test_a_text_trains_a_preset_and_wrong_numbers_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "my.txt").write_text("The herd grazes on the green hill. " * 80)
    words = ("pretrain", "--checkpoint", "tiny-text", "--data", tmp_path / "my.txt", "--output", tmp_path / "run",
             "--rows", 2, "--seq-len", 32, "--train.steps", 1)
    done = train(*words)
    assert done.exit_code == 0, done.output
    assert "tokenizer of the calf\nrandom weights by " in done.output
    for option, value, message in (
        ("--optimizer.learning-rate", "nan", "optimizer.learning_rate is nan, it must be at least 0, and finite"),
        ("--optimizer.ema", 1, "optimizer.ema is 1.0, it must be from 0 to 1, and not 1"),
        ("--train.save-minutes", -1, "train.save_minutes is -1.0, it must be at least 0"),
    ):
        assert train(*words, option, value).output == f"error: {message}\n"


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
