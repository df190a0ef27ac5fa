"""herdgraph train: options by name, one line for what is wrong, and a model at the end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from herdgraph.cli import main
from herdgraph.cli.train import parsed
from herdgraph.errors import HerdError
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.config.presets import TINY
from herdgraph.model.training.recipes import RECIPES
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


def test_a_run_from_the_command_line(files: tuple[Path, Path], tmp_path: Path) -> None:
    arguments = ("pretrain", f"checkpoint={files[0]}", f"data={files[1]}", f"output={tmp_path / 'run'}", "rows=2",
                 "seq_len=64", "train.steps=3", "optimizer.learning_rate=1e-3", "held_out=0.2")
    done = train(*arguments, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["steps"] == 3
    assert found["held_out"] > 0
    with open_checkpoint(Path(found["model"])) as checkpoint:
        assert checkpoint.config == TINY
    again = train(*arguments)
    assert again.exit_code == 0
    assert "trained" in again.output


@pytest.mark.parametrize(("arguments", "message"), [
    (["nonsense"], "'nonsense' is no option: options are given as NAME=VALUE"),
    (["stepz=3"], "there is no option 'stepz': choose among"),
    (["train.stepz=3"], "there is no option 'stepz'"),
    (["rows.x=3"], "option 'rows' has no parts"),
    (["train=3"], "train has parts: give them one by one, as in train.steps="),
    (["rows=many"], "rows is 'many', a int is needed"),
    (["fresh=maybe"], "fresh is 'maybe', it must be true or false"),
    (["broken=ignore"], "broken is 'ignore', it must be one of stop, skip"),
    ([], "data has to be given: data=VALUE"),
])
def test_wrong_options_are_one_line(arguments: list[str], message: str) -> None:
    done = train("pretrain", *arguments)
    assert done.exit_code == 1
    assert message in done.output
    assert "Traceback" not in done.output


@pytest.mark.parametrize("recipe", RECIPES)
def test_options_are_listed(recipe: str) -> None:
    done = train(recipe, "--options")
    assert done.exit_code == 0
    for text in ("output", "has to be given", "train.steps", "optimizer.learning_rate"):
        assert text in done.output


def test_values_become_what_they_are() -> None:
    kind = RECIPES["distil"][1]
    found = parsed(kind, ("data=a,b", "data=c", "output=o", "checkpoint=s", "teacher=none", "weighting=fixed",
                          "soft=0.5", "optimizer.betas=0.8,0.9", "optimizer.base_width=64", "train.recompute=true"))
    assert found.data == (Path("a"), Path("b"), Path("c"))
    assert found.teacher is None
    assert found.optimizer.betas == (0.8, 0.9)
    assert found.optimizer.base_width == 64
    assert found.train.recompute is True
    with pytest.raises(HerdError, match="weighting is 'magic'"):
        parsed(kind, ("weighting=magic",))
