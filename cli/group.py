"""The ``herdgraph`` command group: every verb by its name."""

from __future__ import annotations

import logging

import click

from .. import __version__
from ..build import main as build
from ..calibration.cli import calibrate
from ..console import HerdGroup, set_verbosity
from .bench import bench
from .chat import chat
from .doctor import doctor
from .eval import evaluate
from .generate import generate
from .inspect import inspect
from .plan import plan
from .run import run
from .serve import serve
from .train import train
from .upcycle import upcycle
from .verify import verify


@click.group(cls=HerdGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="herdgraph")
@click.option("-v", "--verbose", count=True, help="Log what is done; -vv: every pass and what it rewrote, too.")
@click.option("-q", "--quiet", is_flag=True, help="Say errors only, no warnings.")
def main(verbose: int, quiet: bool) -> None:
    """Compiled graphs for the Llama 4 herd: build a bundle from a checkpoint, run it, check it."""
    shown = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    set_verbosity(logging.ERROR if quiet else shown)


main.add_command(build, "build")
main.add_command(evaluate, "eval")
for command in (calibrate, train, upcycle, generate, chat, serve, run, inspect, plan, verify, bench, doctor):
    main.add_command(command)
