"""The upcycle command: a dense Llama becomes a Llama 4 checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

from ..console import HerdCommand, emit_json, progress, quantity, stderr, succeed
from ..options import COUNT, PATH, json_option
from .train_progress import told


@click.command(cls=HerdCommand)
@click.argument("source", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, help="Checkpoint directory to create.")
@click.option("--experts", type=COUNT, default=4, show_default=True,
              help="Routed experts of a mixture layer; an even number in split mode.")
@click.option("--mode", type=click.Choice(["shared", "split"]), default="shared", show_default=True,
              help="shared: the shared expert is the whole FFN, routed experts start silent. "
                   "split: routed experts carry the second half of the FFN.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True,
              help="Type of the weights that are written.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of new weights.")
@click.option("--overwrite", is_flag=True, help="Replace an existing checkpoint.")
@json_option
def upcycle(source: Path, output: Path, as_json: bool, **options: Any) -> None:
    """Turn a dense Llama into a Llama 4 checkpoint.

    SOURCE is a dense Llama-family model: a GGUF file or a Hugging Face directory. Its function is kept; training then
    lets the experts specialise.
    """
    from ..model.data.heartbeat import Heartbeat
    from ..model.upcycle import upcycle as convert

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with told(quiet=as_json), progress(*columns, quiet=as_json) as bar:
        task, beat = bar.add_task("reading the dense model", total=None), Heartbeat(f"writing {output}, tensor")

        def on_tensor(done: int, total: int) -> None:
            bar.update(task, description="writing experts and the rest", completed=done, total=total)
            if not stderr.is_terminal:
                beat.tick(done, total)

        report = convert(source, output, on_tensor=on_tensor, **options)
    if as_json:
        emit_json(report.to_json())
    else:
        succeed("wrote", f"{output}: {quantity(report.total)} parameters, {quantity(report.active)} active per token")
