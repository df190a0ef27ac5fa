"""What all commands print: colours on a terminal, none where they are not wanted."""

from __future__ import annotations

import logging
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from herdgraph.cli import main
from herdgraph.console import (
    HerdCommand,
    NoteHandler,
    PrintableLines,
    fail,
    print_warning,
    set_verbosity,
    succeed,
    table,
)
from support.command_line import run


def speak() -> None:
    table("herd", {"calves": 3})
    print_warning("grazing")
    succeed("built", "a fence")
    fail("the gate\nis open")


@pytest.mark.parametrize(("environment", "styled"), [({}, True), ({"NO_COLOR": ""}, True), ({"NO_COLOR": "1"}, False)])
def test_no_color_is_heeded(environment: dict[str, str], styled: bool) -> None:
    done = CliRunner(env={"NO_COLOR": None, **environment}).invoke(HerdCommand("speak", callback=speak), color=True)
    assert done.exit_code == 1
    assert ("\x1b[" in done.stdout, "\x1b[" in done.stderr) == (styled, styled)
    if not styled:
        assert done.stdout == "herd\ncalves  3\n"
        assert done.stderr == "warning: grazing\nbuilt a fence\nerror: the gate is open\n"


def test_foreign_text_is_shown_escaped() -> None:
    def speak() -> None:
        table("t\x1b", {"n\ud800": "v\n\u202e", "\x9b": "ü 🐄"})
        print_warning("w\x1b[2J")
        succeed("built", "o\x07")
        fail("e\x00")

    done = CliRunner().invoke(HerdCommand("speak", callback=speak))
    assert done.stdout == "t\\x1b\nn\\ud800  v\\n\\u202e\n\\x9b     ü 🐄\n"
    assert done.stderr == "warning: w\\x1b[2J\nbuilt o\\x07\nerror: e\\x00\n"


def test_what_is_warned_of_looks_the_same_wherever_it_comes_from(capsys: pytest.CaptureFixture[str]) -> None:
    handler = NoteHandler()
    handler.setFormatter(PrintableLines("%(levelname)s %(name)s: %(message)s"))
    for name in ("herdgraph.export.pipeline", "other"):
        handler.emit(logging.makeLogRecord({"name": name, "levelno": logging.WARNING, "levelname": "WARNING",
                                            "msg": "%s is short", "args": ("hay",)}))
    assert capsys.readouterr().err == "warning: hay is short\nWARNING other: hay is short\n"


def test_log_lines_are_shown_escaped() -> None:
    record = logging.makeLogRecord({"msg": "a\x1bb\nc"})
    assert PrintableLines("%(message)s").format(record) == "a\\x1bb\nc"


@pytest.mark.parametrize(("words", "level"), [
    ([], logging.WARNING), (["-v"], logging.INFO), (["-vv"], logging.DEBUG), (["--quiet"], logging.ERROR),
])
def test_verbosity(words: list[str], level: int, capsys: pytest.CaptureFixture[str]) -> None:
    CliRunner().invoke(main, [*words, "inspect", "tiny"])  # ``run`` would restore the level
    assert logging.getLogger("herdgraph").level == level
    print_warning("grazing")
    assert capsys.readouterr().err == ("" if level == logging.ERROR else "warning: grazing\n")
    set_verbosity(logging.WARNING)


@pytest.mark.parametrize(("name", "meant"), [
    ("--lr", " Did you mean --learning-rate?"), ("--tokens", " Did you mean --max-new-tokens?"),
    ("--max-tokens", " Did you mean --max-new-tokens?"), ("--sed", " Did you mean --seed?"), ("--colour", ""),
])
def test_an_unknown_option_is_told_what_may_be_meant(name: str, meant: str) -> None:
    known = ("--learning-rate", "--max-new-tokens", "--seed", "--raw")
    command = HerdCommand("speak", params=[click.Option([option]) for option in known])
    said = CliRunner().invoke(command, [name, "1"]).stderr
    assert said == f"error: No such option '{name}'.{meant} See speak --help.\n"


def test_help_is_not_cut() -> None:
    assert "..." not in run("--help").stdout.partition("Commands:")[2]


def test_a_run_says_every_line_once() -> None:
    program = """
import logging
from herdgraph.cli.train_progress import told
from herdgraph.console import run_cli

def run():
    with told(quiet=False):
        logging.getLogger("herdgraph.model").info("writing, tensor: 1 of 2")

run_cli(run)
"""
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stderr
    assert printed == "writing, tensor: 1 of 2\n"
