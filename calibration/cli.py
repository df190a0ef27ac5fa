"""The calibrate command, ``herdgraph calibrate`` and ``python -m herdgraph.calibration``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.progress import Progress as Bar

from ..console import HerdCommand, emit_json, print_warning, progress, succeed, table
from ..model.quantization.observers import OBSERVERS
from ..model.quantization.parts import PARTS


@click.command(cls=HerdCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Directory to create.")
@click.option("--data", type=click.Path(path_type=Path), multiple=True, show_default="a built-in text",
              help="Text, .jsonl or .tar file, picture, saved dataset, or directory of pictures; may be repeated.")
@click.option("--no-hessians", is_flag=True,
              help="Leave out what weights are rounded by, squares of the model's widths in memory and on disk.")
@click.option("--kv", type=click.Choice(["float", "fp8"]), default="float", show_default=True,
              help="Precision of keys and values in the evaluation of fp8.")
@click.option("--observer", type=click.Choice(OBSERVERS), default="mse", show_default=True,
              help="How the largest magnitude that an FP8 scale covers is chosen.")
@click.option("--tokens", type=click.IntRange(min=64), default=16384, show_default=True, help="Tokens to read at most.")
@click.option("--min-tokens-shown", type=click.IntRange(min=1), default=64, show_default=True,
              help="Tokens that every expert is measured on: its own, then those closest to being sent to it.")
@click.option("--min-tokens", type=click.IntRange(min=0), default=1, show_default=True,
              help="Tokens that the router itself must send to every expert.")
@click.option("--under-covered", type=click.Choice(["warn", "fail"]), default="warn", show_default=True,
              help="What to do when an expert gets fewer than --min-tokens.")
@click.option("--high-precision", type=click.Choice([name.replace(" ", "-") for name in PARTS]), multiple=True,
              help="A part that fp8 leaves in 16 bits; may be repeated. Meta's choice: all but routed-experts.")
@click.option("--max-kl", type=click.FloatRange(min=0, min_open=True),
              help="Leave as few more parts in high precision as keep the mean KL per token below this.")
@click.option("--import-scales", is_flag=True, help="Take the scales that an FP8 checkpoint carries; reads no data.")
@click.option("--overwrite", is_flag=True, help="Replace an existing calibration.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def calibrate(
    checkpoint: Path, output: Path, data: tuple[Path, ...], no_hessians: bool, tokens: int,
    high_precision: tuple[str, ...], import_scales: bool, overwrite: bool, as_json: bool, **options: Any,
) -> None:
    """Measure the inputs of CHECKPOINT's weights on data, for `herdgraph build --calibration` with any recipe.

    The model is read layer by layer and expert by expert: it may be larger than the memory. A run that was cut off
    continues where it stopped. The output has a report, report.html.
    """
    from ..model.checkpoint import open_checkpoint
    from . import calibrate as api
    from .imported import import_scales as imported
    from .samples import read_samples
    from .windows import data_of

    with open_checkpoint(checkpoint) as source, progress(*Bar.get_default_columns(), quiet=as_json) as bar:
        if import_scales:
            found = imported(source, output, overwrite=overwrite)
        else:
            if not data:
                print_warning("no --data was given: calibrating on built-in text" + " and drawn pictures" * bool(
                    source.config.vision) + "; give your own for a model that will serve you")
            samples = read_samples(data, images=source.config.vision is not None)
            read = data_of(source, samples, most_tokens=tokens)
            kept = tuple(name.replace("-", " ") for name in high_precision)
            chosen = api.Options(hessians=not no_hessians, high_precision=kept, **options)
            found = api.calibrate(source, output, read, chosen, overwrite=overwrite,
                                  progress=_hooks(bar, api.CalibrationProgress))
    if as_json:
        emit_json({name: value for name, value in found.items() if name != "inputs"})
    else:
        _show(found)
        succeed("wrote", f"{output}; open {output / 'report.html'}")


def _hooks(bar: Bar, hooks: Any) -> Any:
    task = bar.add_task("reading", total=None)
    return hooks(
        stage=lambda name, parts: bar.reset(task, description=name, total=parts),
        part=lambda: bar.advance(task),
    )


def _show(found: dict[str, Any]) -> None:
    from .report import change

    quality, own = found["quality"], found["coverage"]["own"]
    rows = {"data": f"{found['data']['tokens']} tokens, {found['data']['tiles']} image tiles"}
    if own:
        counts = [count for layer in own.values() for count in layer]
        shown = sum(1 for layer in found["coverage"]["shown"].values() for count in layer if count)
        rows["experts"] = (f"{len(counts)}, {min(counts)} to {max(counts)} tokens from the router; {shown} were shown "
                           f"more; {len(found['coverage']['dead'])} got none of their own")
    if quality:
        rows["fp8 against float32"] = (f"KL {quality['mean_kl']:.2e} per token, perplexity {change(quality)}, same "
                                   f"top token {quality['top1']:.1%} ({quality['tokens']} tokens held out)")
        rows["in high precision in fp8"] = ", ".join(found["high_precision_parts"]) or "nothing beyond the recipe"
    table("calibration", rows)

