"""The calibrate command."""

from __future__ import annotations

from pathlib import Path

import click
from rich.progress import Progress

from ..console import emit_json, progress, succeed
from ..errors import HerdError

DEFAULT_TEXT = Path(__file__).parent / "data" / "jargon.txt"


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="File to write (.safetensors).")
@click.option("--recipe", default="int4", show_default=True, help="Recipe whose weights are to be rounded.")
@click.option("--data", type=click.Path(path_type=Path), multiple=True, show_default="pages of the Jargon File",
              help="Plain text file; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def calibrate(checkpoint: Path, output: Path, recipe: str, data: tuple[Path, ...], as_json: bool) -> None:
    """Measure what CHECKPOINT's weights are used for.

    The result is for `build.py --calibration`. The model is held in memory in float32 as a whole.
    """
    from ..export.targets import target_of
    from ..model.checkpoint import open_checkpoint
    from .moments import measure, windows_of

    _, precision = target_of("cpu", recipe)
    if not output.absolute().parent.is_dir():
        raise HerdError(f"{output.absolute().parent} is not a directory: choose another output")
    texts = [_text(path) for path in data or (DEFAULT_TEXT,)]
    with open_checkpoint(checkpoint) as source, progress(*Progress.get_default_columns(), quiet=as_json) as bar:
        task = bar.add_task("measuring", total=None)
        tokens = measure(source, precision, windows_of(source, texts), output,
                         lambda done, total: bar.update(task, completed=done, total=total))
    if as_json:
        emit_json({"output": str(output), "tokens": tokens})
    else:
        succeed("wrote", f"{output}, measured on {tokens} tokens")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise HerdError(f"{path} cannot be read as text: {error}") from error
