"""Every verb on every extra works, or names in one line the extra that it needs.

The table is proved twice. `make test` refuses the imports of what an installation would not have, which is quick but
trusts the metadata; `make test-packaging` installs the wheel into fresh environments and runs every cell (`-s` prints
the table), with the newest releases of what we require and, as `make test-lowest` alone, with the oldest.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

from herdgraph.console import HerdCommand
from herdgraph.model.config.presets import TINY
from support import command_line, dense, herds
from support.request_files import small_wheel

ROOT = Path(__file__).parents[2]
LOWEST = Path(__file__).with_name("lowest.txt")
ENVIRONMENTS = ("base", "cpu", "cpu,build", "train")
"""Extras of ``pip install "herdgraph[...]"``; base has none."""

WORKS = "works"
TABLE = {
    # command line                                           base       cpu        cpu,build  train
    "inspect {bundle}":                                      (WORKS,    WORKS,     WORKS,     WORKS),
    "inspect {checkpoint}":                                  ("build",  "build",   WORKS,     WORKS),
    "doctor --help":                                         (WORKS,    WORKS,     WORKS,     WORKS),
    "plan scout --devices 8xH100":                           (WORKS,    WORKS,     WORKS,     WORKS),
    "plan scout --devices 8xH100 --plot {out}.png":          ("build",  "build",   WORKS,     "build"),
    "generate {bundle} -p Hi --max-new-tokens 2":            ("cpu",    WORKS,     WORKS,     "cpu"),
    "chat {bundle} --max-new-tokens 2":                      ("cpu",    WORKS,     WORKS,     "cpu"),
    "bench {bundle} --prompt-tokens 16 -n 2 --repeats 1":    ("cpu",    WORKS,     WORKS,     "cpu"),
    "eval {bundle} --data {questions} --tasks animals":      ("cpu",    WORKS,     WORKS,     "cpu"),
    "serve {bundle}":                                        ("serve",) * 4,
    "run {bundle} Hi":                                       ("cluster",) * 4,
    "verify {bundle} {checkpoint} --tokens 8":               ("build",  "build",   WORKS,     "cpu"),
    "build {checkpoint} -o {out}":                           ("build",  "build",   WORKS,     "build"),
    "calibrate {checkpoint} -o {out} --data {text}":         ("build",  "build",   WORKS,     "build"),
    "upcycle {dense} -o {out} --experts 2":                  ("build",  "build",   WORKS,     WORKS),
    "upcycle {gguf} -o {out} --experts 2":                   ("build",  "build",   WORKS,     "build"),
    "train pretrain --data {text} --checkpoint {checkpoint} --output {out} --rows 2 --seq-len 32 --train.steps 1":
                                                             ("train",  "train",   "train",   WORKS),
}  # fmt: skip
VERBS = sorted({line.split()[0] for line in TABLE})


@dataclass(frozen=True)
class Inputs:
    """Files that the command lines name."""

    bundle: Path
    checkpoint: Path
    dense: Path
    gguf: Path
    text: Path
    questions: Path

    def arguments(self, line: str, out: Path) -> list[str]:
        """The arguments of a line of the table; paths may hold spaces."""
        return [word.format(**vars(self), out=out) for word in line.split()]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    directory = tmp_path_factory.mktemp("inputs with spaces")
    found = Inputs(directory / "bundle", directory / "checkpoint", directory / "dense", directory / "dense.gguf",
                   directory / "text.jsonl", small_wheel(directory))
    herds.save(TINY, found.checkpoint)
    herds.write_processor(found.checkpoint)
    dense.save_directory(found.dense)
    dense.save_gguf(found.gguf)
    rows = [{"text": f"The herd of {number} grazes on the green hill. "} for number in range(40)]
    found.text.write_text("\n".join(map(json.dumps, rows)))
    command_line.run("build", found.checkpoint, "-o", found.bundle)
    return found


def cell(status: int, output: str, errors: str) -> str:
    """What a run shows: that it works, the extra that its only line names, or what it said instead."""
    if status == 0:
        return WORKS
    named = re.fullmatch(r"error: [^\n]*?pip install 'herdgraph\[([\w-]+)\]'[^\n]*\n", errors)
    if status == 1 and output == "" and named:
        return named[1]
    return f"BROKEN, status {status}: {(errors or output).strip()[-200:]}"


def modules_missing_in(environment: str) -> list[str]:
    """Top-level modules of our requirements that an environment does not have."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    modules = {extra: {re.split(r"[^\w-]", text)[0].replace("-", "_") for text in requirements}
               for extra, requirements in extras.items()}
    installed = set().union(*(modules[extra] for extra in environment.split(",") if extra != "base"))
    return sorted(set().union(*modules.values()) - installed)


REFUSING = """
import json, sys
missing, lines = json.load(sys.stdin)

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
from click.testing import CliRunner
from herdgraph.cli import main

done = [CliRunner().invoke(main, line, prog_name="herdgraph") for line in lines]
print(json.dumps([(run.exit_code, run.stdout, run.stderr) for run in done]))
"""
"""Runs command lines in a process that cannot import some modules."""


def runs_without(missing: list[str], lines: list[list[str]]) -> list[tuple[int, str, str]]:
    """Status, output and errors of command lines where modules are missing."""
    done = subprocess.run([sys.executable, "-c", REFUSING], input=json.dumps([missing, lines]), text=True,
                          capture_output=True, check=True)
    return [tuple(run) for run in json.loads(done.stdout.splitlines()[-1])]


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_missing_packages_are_one_line(environment: str, inputs: Inputs, tmp_path: Path) -> None:
    """Cells that name an extra; those that work are left to the fresh environments and the verbs' own tests."""
    column = {line: cells[ENVIRONMENTS.index(environment)] for line, cells in TABLE.items()}
    named = {line: extra for line, extra in column.items() if extra != WORKS}
    runs = runs_without(modules_missing_in(environment), [inputs.arguments(line, tmp_path / "out") for line in named])
    assert {line: cell(*run) for line, run in zip(named, runs, strict=True)} == named
    assert not any(tmp_path.iterdir())


def test_help_needs_the_base_install_alone() -> None:
    lines = [["--help"], *([verb, "--help"] for verb in VERBS)]
    for line, (status, output, errors) in zip(lines, runs_without(modules_missing_in("base"), lines), strict=True):
        assert (status, errors) == (0, ""), line
        assert output.startswith(f"Usage: {' '.join(['herdgraph', *line[:-1]])} ")


@pytest.mark.parametrize("module", ["herdgraph.nowhere", "nowhere", "torch.nowhere"])
def test_other_missing_modules_are_defects(module: str) -> None:
    """What no extra brings keeps its traceback."""
    command = HerdCommand("probe", callback=lambda: importlib.import_module(module))
    with pytest.raises(ModuleNotFoundError, match="nowhere"):
        command.main([])


def test_table_has_every_verb() -> None:
    from herdgraph.cli import main

    assert sorted(main.commands) == VERBS


@pytest.mark.slow
@pytest.mark.parametrize(("versions", "environments"), [("newest", ENVIRONMENTS), ("lowest", ("cpu,build", "train"))],
                         ids=["newest", "lowest"])
def test_verbs_in_fresh_environments(
    versions: str, environments: tuple[str, ...], native_wheel: Path, inputs: Inputs, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found: dict[str, list[str]] = {line: [] for line in TABLE}
    for environment in environments:
        python = installed(native_wheel, environment, tmp_path / environment, versions)
        for number, line in enumerate(TABLE):
            out = tmp_path / f"out {environment} {number}"
            found[line].append(cell(*run(python, inputs.arguments(line, out), tmp_path)))
        assert all(run(python, [verb, "--help"], tmp_path)[0] == 0 for verb in VERBS)
        shutil.rmtree(tmp_path / environment)
    with capsys.disabled():
        print("\n" + as_markdown(found, environments))
    columns = [ENVIRONMENTS.index(environment) for environment in environments]
    assert found == {line: [cells[column] for column in columns] for line, cells in TABLE.items()}


def installed(wheel: Path, environment: str, directory: Path, versions: str) -> Path:
    """The interpreter of a new virtual environment with the wheel and its extras, in newest or lowest versions."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", directory], check=True)
    extras = "" if environment == "base" else f"[{environment}]"
    constraints = directory / "constraints.txt"  # torch of another build may bring gigabytes of CUDA packages
    lowest = LOWEST.read_text() if versions == "lowest" else ""
    constraints.write_text(f"torch=={importlib.metadata.version('torch')}\n{lowest}")
    python = directory / "bin" / "python"
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--constraint", constraints,
                    f"{wheel}{extras}"], check=True, stderr=subprocess.PIPE)
    return python


def run(python: Path, arguments: list[str], directory: Path) -> tuple[int, str, str]:
    """Status, output and errors of the installed command, outside of the checkout."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([python.with_name("herdgraph"), *arguments], cwd=directory, env=clean, input="hello\n/quit\n",
                          capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def as_markdown(found: dict[str, list[str]], environments: tuple[str, ...]) -> str:
    """The table for a reader: verbs by extras."""
    rows = [["", *environments], ["---"] * (1 + len(environments)), *([f"`{line}`", *found[line]] for line in found)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
