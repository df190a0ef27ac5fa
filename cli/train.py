"""The train command: a kind of run by name, its options from the fields of its dataclass (tyro)."""

from __future__ import annotations

import contextlib
import io
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from ..console import HerdCommand, HerdGroup, emit_json, progress, stderr, succeed

RUNS = {
    "align": "Draw an image tower's features to the names of pictures, before early fusion.",
    "pretrain": "Train on next tokens, text and pictures fused from the first layer.",
    "distil": "Learn from a teacher's distribution and from the text at once.",
    "upcycle-then-distil": "Turn a dense model into a mixture of experts, and distil it from its former self.",
    "long-context": "Raise the context of a model.",
}
"""Kinds of runs by their name on the command line; ``model/training/runs`` has a module for each."""

_BORDER = "│╭╮╰╯─ "


@click.group(cls=HerdGroup, context_settings={"help_option_names": ["-h", "--help"]})
def train() -> None:
    """Train a model.

    Options are given as --output run --data corpus/ --checkpoint calf --train.steps 2000 --optimizer.learning-rate
    1e-3; `herdgraph train RUN --help` lists all. Started by torchrun it uses all processes. A run continues from the
    last checkpoint in its output.
    """


def _add_run(name: str, purpose: str) -> None:
    # What click does not know is left to tyro, --help included.
    @train.command(name, cls=HerdCommand, help=purpose, add_help_option=False,
                   context_settings={"ignore_unknown_options": True})
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    @click.option("--json", "as_json", is_flag=True, help="Print one JSON document at the end.")
    def command(arguments: tuple[str, ...], as_json: bool) -> None:
        from ..model.training.runs import TRAINING_RUNS

        run, kind = TRAINING_RUNS[name.replace("-", "_")]
        _train(run, parse_options(kind, arguments, f"herdgraph train {name}"), as_json=as_json)


for _name, _purpose in RUNS.items():
    _add_run(_name, _purpose)


def parse_options(kind: type, arguments: tuple[str, ...], command: str) -> Any:
    """Options of a run from the command line; ``--help`` prints them and ends the process.

    Args:
        kind: dataclass of the options.
        arguments: of the command line.
        command: as it was typed, for help and messages.

    Raises:
        click.UsageError: an unknown option, a value of another kind, or an option that has to be given and is not.
    """
    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, args=arguments, prog=command)
    except SystemExit as ended:
        if not ended.code:
            raise
        raise click.UsageError(one_line(said.getvalue()), click.get_current_context(silent=True)) from ended


def one_line(box: str) -> str:
    """What tyro says of a wrong command line in a box, on one line: the message, and the option that may be meant."""
    lines = [line.strip(_BORDER) for line in box.splitlines()]
    paragraphs = [part.splitlines() for part in "\n".join(lines[1:]).split("\n\n") if part.strip()]
    message = " ".join(paragraphs[0]) if paragraphs else "the options cannot be read"
    if message.startswith("Missing from"):
        names = re.findall(r"(?:^|\s)(--[\w.-]+)(?= [\[{A-Z])", message)
        return f"{', '.join(dict.fromkeys(names))} must be given."
    meant = next((line for part in paragraphs[1:] for line in part if line.startswith("--")), "")
    hint = f": did you mean {meant.split()[0].rstrip(',')}?" if "Perhaps you meant" in box and meant else "."
    return message.rstrip(".") + hint


def _train(run: Any, options: Any, *, as_json: bool) -> None:
    """Run, with a progress bar on a terminal and a line every ``train.log_every`` steps elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    lines = StepLines(options.train.steps, options.train.log_every)
    speaks = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started
    with progress(*columns, quiet=as_json) as bar:
        task = bar.add_task("starting", total=options.train.steps)

        def on_step(done: Any, record: dict[str, float]) -> None:
            text = f"loss {record['loss']:.3f}, {record['tokens_per_second']:.0f} tokens/s, MFU {record['mfu']:.0%}"
            bar.update(task, completed=done.step, description=text)
            if speaks and not stderr.is_terminal:
                lines.show(done.step, record)

        found = run(options, on_step)
    if speaks:
        _report(found, options.output / "model", as_json=as_json)


def _report(found: Any, model: Path, *, as_json: bool) -> None:
    held_out = found.held_out.get(found.step)
    if as_json:
        emit_json({"steps": found.step, "tokens": found.tokens, "loss": found.losses[-1] if found.losses else None,
                   "held_out": held_out, "model": str(model)})
    else:
        evaluated = "" if held_out is None else f", held-out loss {held_out:.4f}"
        succeed("trained", f"{model}: {found.step} steps, {found.tokens} tokens{evaluated}")


@dataclass
class StepLines:
    """Progress as lines, for output that is not a terminal.

    Attributes:
        steps: of the whole run.
        every: steps between lines; the first and the last step get one as well.
        started: when this process made its first step, in seconds of ``time.monotonic``.
    """

    steps: int
    every: int
    started: float = field(default_factory=time.monotonic)
    _first: int = 0

    def show(self, step: int, record: dict[str, float]) -> None:
        """Print the line of a step, if it is one that gets a line."""
        self._first = self._first or step
        if step % self.every and step not in (self._first, self.steps):
            return
        done = step - self._first + 1
        left = (time.monotonic() - self.started) / done * (self.steps - step)
        end = time.strftime("%H:%M:%S", time.localtime(time.time() + left))
        click.echo(f"step {step}/{self.steps}  loss {record['loss']:.4f}  {record['tokens_per_second']:.0f} tokens/s  "
                   f"ends {end}, in {left:.0f} s", err=True)
