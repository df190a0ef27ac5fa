"""The command line, called in this process or as a process of its own."""

from __future__ import annotations

import logging
import subprocess
import sys

from click.testing import CliRunner


def run(*arguments: object, stdin: str | bytes = "") -> subprocess.CompletedProcess[str]:
    """Run ``herdgraph ARGUMENTS`` in this process: the same errors and exit status, without starting Python again.

    Anything but an orderly end is raised, so that a traceback fails the test.
    """
    from herdgraph.cli import main

    words, logger = [str(argument) for argument in arguments], logging.getLogger("herdgraph")
    level = logger.level
    try:
        done = CliRunner().invoke(main, words, prog_name="herdgraph", input=stdin)
    finally:
        logger.setLevel(level)  # a process would have ended with its -q
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return subprocess.CompletedProcess(words, done.exit_code, done.stdout, done.stderr)


def run_process(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run ``python -m herdgraph ARGUMENTS`` as a user does."""
    command = [sys.executable, "-m", "herdgraph", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, input=stdin, check=False, errors="surrogateescape")
