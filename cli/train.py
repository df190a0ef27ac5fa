"""The train command: a kind of run by name, its options from the fields of its dataclass (tyro)."""

from __future__ import annotations

import contextlib
import io
import os
import re
from typing import Any

import click
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from ..console import HerdCommand, HerdGroup, emit_json, progress, stderr, succeed
from .train_progress import StepLines, told

RUNS = {
    "align": "Teach an image tower to see, before early fusion.",
    "pretrain": "Learn the next tokens of text and pictures.",
    "distil": "Learn from a teacher and from the text at once.",
    "codistil": "Several students learn from one teacher in one run.",
    "upcycle-then-distil": "Make experts of a dense model, and distil it.",
    "long-context": "Raise the context of a model.",
}
"""Kinds of runs by their name on the command line; ``model/training/runs`` has a module for each."""

_OF_OTHERS = {
    "lr": "--optimizer.learning-rate", "epochs": "--train.steps", "max-steps": "--train.steps", "batch-size": "--rows",
    "model": "--checkpoint", "preset": "--checkpoint", "block-size": "--seq-len", "warmup-steps": "--optimizer.warmup",
    "save-steps": "--train.save-every", "gradient-accumulation-steps": "--train.accumulate",
}
"""Options of other trainers that are called otherwise here."""

_JSON = "--json prints one JSON document at the end and nothing before it."
_BORDER = "│╭╮╰╯─ "


@click.group(cls=HerdGroup, context_settings={"help_option_names": ["-h", "--help"]})
def train() -> None:
    """Train a model.

    For instance `herdgraph train pretrain --checkpoint calf --data my.txt --output run --train.steps 100`;
    `herdgraph train pretrain --help` lists all options with their defaults. Started by torchrun it uses all processes.

    The same command continues a run that was ended or killed, from the last checkpoint in its output.
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
        _train(run, parse_options(kind, arguments, f"herdgraph train {name}", purpose), as_json=as_json)


for _name, _purpose in RUNS.items():
    _add_run(_name, _purpose)


def parse_options(kind: type, arguments: tuple[str, ...], command: str, purpose: str = "") -> Any:
    """Options of a run from the command line; ``--help`` prints them and ends the process.

    Args:
        kind: dataclass of the options.
        arguments: of the command line.
        command: as it was typed, for help and messages.
        purpose: for help.

    Raises:
        click.UsageError: an unknown option, a value of another kind, or an option that has to be given and is not.
    """
    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, args=arguments, prog=command, description=f"{purpose}\n{_JSON}")
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
    wrong = re.search(r"^Unrecognized options: --([\w-]+)", message)
    if wrong and wrong[1].replace("_", "-") in _OF_OTHERS:
        return f"{message.rstrip('.')}: did you mean {_OF_OTHERS[wrong[1].replace('_', '-')]}?"
    meant = next((line for part in paragraphs[1:] for line in part if line.startswith("--")), "")
    hint = f": did you mean {meant.split()[0].rstrip(',')}?" if "Perhaps you meant" in box and meant else "."
    return message.rstrip(".") + hint


def _train(run: Any, options: Any, *, as_json: bool) -> None:
    """Run, with a progress bar on a terminal and a line every ``train.log_every`` steps elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    lines = StepLines(options.train.steps, options.train.log_every)
    speaks = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started
    made = 0
    with told(quiet=as_json or not speaks), progress(*columns, quiet=as_json or not stderr.is_terminal) as bar:
        task = bar.add_task("starting", total=options.train.steps)

        def on_step(done: Any, record: dict[str, float]) -> None:
            nonlocal made
            made += 1
            text = f"loss {record['loss']:.3f}, {record['tokens_per_second']:.0f} tokens/s, MFU {record['mfu']:.0%}"
            bar.update(task, completed=done.step, description=text)
            if speaks and not stderr.is_terminal:
                lines.show(done.step, record)

        found = run(options, on_step)
    if speaks:
        _report(found, made, options, as_json=as_json)


def _report(found: Any, made: int, options: Any, *, as_json: bool) -> None:
    """Say what came out, or that there was nothing left to do."""
    model, held_out = options.model, found.held_out.get(found.step)
    if as_json:
        emit_json({"steps": found.step, "steps_now": made, "tokens": found.tokens, "held_out": held_out,
                   "loss": found.losses[-1] if found.losses else None, "model": str(model)})
    elif made or not found.step:
        evaluated = "" if held_out is None else f", held-out loss {held_out:.4f}"
        succeed("trained", f"{model}: {found.step} steps, {found.tokens} tokens{evaluated}; next: herdgraph build "
                           f"{model} -o BUNDLE")
    else:
        succeed("finished", f"before: {model} has its {found.step} steps, nothing was trained now; for more give "
                            f"--train.steps above {found.step}, for a new run another --output")
