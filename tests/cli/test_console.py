"""What all commands print: colours on a terminal, none where they are not wanted."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from herdgraph.console import HerdCommand, fail, print_warning, succeed, table


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
