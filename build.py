"""Build engines: a Llama 4 checkpoint directory becomes a bundle.

herdgraph build CHECKPOINT -o BUNDLE [--target cpu] [--recipe int8] [--shards tp=2,ep=4] [--dry-run] [--json]

``python build.py`` is the same command.
"""

from __future__ import annotations

if __name__ == "__main__" and __spec__ is not None and __spec__.name == "build":  # PyPA's builder has this name, too
    raise SystemExit("error: `python -m build` finds herdgraph's own build.py here: run `pip wheel . --no-deps` or "
                     "`uv build` for the wheel, `python build.py CHECKPOINT -o BUNDLE` for a bundle")

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBar

from herdgraph.console import (
    HerdCommand,
    duration,
    emit_json,
    print_warning,
    progress,
    quantity,
    size,
    succeed,
    table,
)
from herdgraph.errors import HerdError
from herdgraph.export.targets.precision import PRECISIONS, caches_by_target, recipes_by_target
from herdgraph.options import COUNT, PATH, Number, TokenCount, context_option, json_option, kv_option, recipe_option
from herdgraph.runtimes.native.library import library_path

if TYPE_CHECKING:
    from herdgraph.export.pipeline import BuildPlan, BuildProgress, PlanOptions
    from herdgraph.model.config import HerdConfig
    from herdgraph.model.config.shard_plan import ShardPlan
    from herdgraph.model.quantization.recipes import Recipe


@click.command(cls=HerdCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("checkpoint", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, help="Bundle directory to create.")
@click.option("--target", show_default="cpu, or cpu-stock where our own operators are not installed",
              help=f"One of {', '.join(PRECISIONS)}; the last is not lowered, and portable.")
@recipe_option(None, recipes_by_target(), shown="the first of the target's")
@kv_option(f"float as the target computes, {caches_by_target()}; 8 bits need --calibration, but for cpu")
@click.option("--calibration", type=PATH,
              help="Directory that `herdgraph calibrate` wrote: fp8 needs it, 4-bit weights are rounded by it.")
@click.option("--bits", type=Number(min=0, min_open=True), help="Average bits per weight of the whole bundle, such as "
              "5.5: recipe int4 then chooses by calibration which part gets how many.")
@click.option("--sm", default="89,120", show_default=True, help="tensorrt-rtx: compute capabilities of one plan.")
@click.option("--profile", type=click.Choice(["both", "decode", "prefill"]), default="both", show_default=True,
              help="TensorRT: what the decoder's plan is for, which decides how experts are computed.")
@click.option("--max-batch", "batch", type=COUNT, default=8, show_default=True,
              help="TensorRT: most sequences decoded together.")
@context_option("TensorRT: most tokens of a sequence", type=TokenCount(16), show_default="the model's, at most 128k")
@click.option("--allow-fallback", is_flag=True, help="TensorRT: keep a plan whose FP8 products became 16-bit ones.")
@click.option("--shards", help="Split the decoder over ranks: tp=2,ep=4,pp=2, or auto with --devices.")
@click.option("--devices", help="What --shards auto plans for, such as 8xH100 or 8x80GB (see `herdgraph plan`).")
@click.option("--overwrite", is_flag=True, help="Replace an existing bundle.")
@click.option("--dry-run", is_flag=True, help="Check the checkpoint, print the memory plan and stop.")
@json_option
def main(
    checkpoint: Path, output: Path, target: str | None, recipe: str | None, kv: str, calibration: Path | None,
    bits: float | None, sm: str, shards: str | None, devices: str | None, overwrite: bool, dry_run: bool,
    as_json: bool, **limits: Any,
) -> None:
    """Build a bundle from a checkpoint.

    CHECKPOINT is a directory with a Llama 4 model in Hugging Face or Meta layout, or calf, the small model of the
    repository. Weights are streamed tensor by
    tensor: the memory needed does not grow with the model.
    """
    from herdgraph.export.pipeline import PlanOptions, plan_build
    from herdgraph.export.targets.registry import target_of
    from herdgraph.model.checkpoint import open_checkpoint

    target = target or _default_target()
    _, precision = target_of(target, recipe)
    precision = replace(precision, caches=kv)  # type: ignore[arg-type]
    options = PlanOptions(sm=tuple(filter(None, sm.replace(" ", "").split(","))), **limits)
    with open_checkpoint(checkpoint) as source:
        split = _split(shards, devices, source.config, precision, options)
        plan = plan_build(source, output, target=target, recipe=precision, calibration=calibration, options=options,
                          shards=split, overwrite=overwrite, bits=bits)
        if plan.refusal and not dry_run:
            raise plan.refusal
        expected = plan.expected_seconds()
        if not as_json:
            _show(plan, checkpoint, expected, err=not dry_run)
        if dry_run:
            _end_dry_run(plan, expected, as_json=as_json)
            return
        started = time.perf_counter()
        with _progress_bar(quiet=as_json) as bar:
            bundle = plan.run(_hooks(bar))
    seconds = time.perf_counter() - started
    if as_json:
        built = {"bundle": str(bundle.directory), "bytes": bundle.bytes, "seconds": round(seconds, 2)}
        emit_json(built | {"expected_seconds": round(expected, 1)} | asdict(plan.memory))
    else:
        succeed("built", f"{bundle.directory} ({size(bundle.bytes)}) in {seconds:.1f} s")


def _default_target() -> str:
    """The target for this machine's CPU: with our own operators where they are."""
    if library_path() is not None:
        return "cpu"
    print_warning("herdgraph's own CPU operators are not installed here: building for cpu-stock, which runs without "
                  "them and is slower (--target cpu builds for machines that have them)")
    return "cpu-stock"


def _split(
    text: str | None, devices: str | None, config: HerdConfig, recipe: Recipe, options: PlanOptions
) -> ShardPlan | None:
    """The split that was asked for: as it was given, or chosen for some devices."""
    from herdgraph.model.config.shard_plan import ShardPlan

    if (text == "auto") != (devices is not None):
        raise HerdError(f"--shards is {text or 'not given'} and --devices {devices or 'not given'}: give --devices "
                        "with --shards auto, and only then")
    if text is None:
        return None
    if devices is None:
        return ShardPlan.parse(text)
    from herdgraph.export.planner import choose

    return choose(config, recipe.name, devices, context=options.context, batch=options.batch,
                  kv=None if recipe.caches == "float" else recipe.caches)


def _show(plan: BuildPlan, checkpoint: Path, expected: float, *, err: bool) -> None:
    """Print the plan, on standard error while a build follows."""
    memory, target, recipe = plan.memory, plan.job.target, plan.job.recipe
    ranks = {} if plan.shards is None else {
        "shards": f"{plan.shards}: {plan.shards.world} ranks, the largest about {size(max(memory.rank_bytes))}"}
    free = "" if memory.free_bytes is None else f" ({size(memory.free_bytes)} free)"
    table("build plan", {
        "checkpoint": f"{checkpoint} ({quantity(memory.parameters)} parameters)",
        "target": f"{target.name}, recipe {recipe.name} ({recipe.purpose}): {target.purpose}",
        "bundle": f"about {size(memory.bundle_bytes)}{free}", **ranks,
        "peak memory": f"about {size(memory.peak_memory_bytes)}, whatever the number of layers and experts",
        "time": f"about {duration(expected)} on this machine as it is now",
    }, err=err)


def _end_dry_run(plan: BuildPlan, expected: float, *, as_json: bool) -> None:
    """Say what a build would be refused for."""
    if as_json:
        emit_json(asdict(plan.memory) | {"expected_seconds": round(expected, 1)})
    if plan.refusal:
        print_warning(str(plan.refusal))


def _progress_bar(*, quiet: bool) -> ProgressBar:
    columns = (TextColumn("{task.description:32}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    return progress(*columns, quiet=quiet)


def _hooks(bar: ProgressBar) -> BuildProgress:
    from herdgraph.export.pipeline import BuildProgress

    task, check = bar.add_task("starting", total=None), bar.add_task("checked", total=None, visible=False)
    return BuildProgress(
        stage=lambda name: bar.update(task, description=name),
        weights=lambda total: bar.update(task, total=total),
        written=lambda count: bar.update(task, advance=count),
        checked=lambda done, total: bar.update(check, completed=done, total=total, visible=done < total),
    )


if __name__ == "__main__":
    main()
