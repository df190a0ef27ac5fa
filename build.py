"""Build engines: a Llama 4 checkpoint directory becomes a bundle.

python build.py CHECKPOINT -o BUNDLE [--target cpu] [--recipe fp32] [--shards tp=2,ep=4] [--dry-run] [--json]
"""

from __future__ import annotations

if __name__ == "__main__" and __spec__ is not None and __spec__.name == "build":  # PyPA's builder has this name, too
    raise SystemExit("error: `python -m build` finds herdgraph's own build.py here: run `pip wheel . --no-deps` or "
                     "`uv build` for the wheel, `python build.py CHECKPOINT -o BUNDLE` for a bundle")

import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBar

from herdgraph.console import HerdCommand, emit_json, print_warning, progress, quantity, size, succeed, table
from herdgraph.errors import HerdError
from herdgraph.export.targets.precision import PRECISIONS, caches_by_target, recipes_by_target
from herdgraph.files import check_output, free_bytes, require_room
from herdgraph.model.config import HerdConfig
from herdgraph.model.quantization.recipes import Caches

if TYPE_CHECKING:
    from herdgraph.export.pipeline import Progress
    from herdgraph.export.targets.registry import Target
    from herdgraph.export.targets.tensorrt.plans import PlanOptions
    from herdgraph.model.checkpoint import Checkpoint
    from herdgraph.model.config.shard_plan import ShardPlan
    from herdgraph.model.quantization.recipes import Recipe

_GRAPH_MEMORY = 600 << 20
"""Memory of the exporter itself: torch, onnx and a graph without weights (see docs/building.md)."""

_GRAPH_BYTES = 4 << 20
"""More than the graphs without weights, and the manifest, take on disk."""


@dataclass(frozen=True)
class MemoryPlan:
    """What a build will need, before it starts.

    Attributes:
        parameters: parameters of the checkpoint.
        bundle_bytes: size of the bundle's weights.
        rank_bytes: of each rank of a bundle that is split, without the processor's files.
        free_bytes: free space where it will be written, None where that is not known.
        peak_memory_bytes: estimated peak memory of the build; it does not grow with the number of layers or experts.
    """

    parameters: int
    bundle_bytes: int
    rank_bytes: list[int]
    free_bytes: int | None
    peak_memory_bytes: int


def memory_plan(
    config: HerdConfig, output: Path, recipe: Recipe, shards: ShardPlan | None = None
) -> MemoryPlan:
    """Plan a build of a configuration by a precision recipe, for all ranks when it is split."""
    from herdgraph.export.weights.stream import BLOCK_BYTES
    from herdgraph.model.config.names import expected_tensors
    from herdgraph.model.config.parameter_counts import model_size
    from herdgraph.model.config.shard_plan import ShardPlan

    plan = shards or ShardPlan()
    ranks = [_stored_bytes(config, plan, rank, recipe) for rank in range(plan.world)]
    shapes = expected_tensors(config)
    expert = max((math.prod(shape[1:]) for name, shape in shapes.items() if ".experts." in name), default=0)
    return MemoryPlan(
        parameters=model_size(config).total,
        bundle_bytes=round(sum(ranks)),
        rank_bytes=[round(count) for count in ranks] if shards else [],
        free_bytes=free_bytes(output),
        peak_memory_bytes=_GRAPH_MEMORY + 3 * max(BLOCK_BYTES, 4 * expert),
    )


def _stored_bytes(config: HerdConfig, plan: ShardPlan, rank: int, recipe: Recipe) -> float:
    """Bytes of the weights of a rank."""
    from herdgraph.model.config.shard_plan import shapes_of_rank

    shapes = shapes_of_rank(plan, config, rank)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    table = sizes.pop("embed_tokens.weight", 0)
    tied, stage = config.text.tie_word_embeddings, plan.stage_of(rank)
    looked_up = table if stage == 0 else 0
    sizes["lm_head.weight"] = table if tied and stage == plan.pipeline - 1 else sizes.get("lm_head.weight", 0)
    return 4 * looked_up + sum(
        count * (recipe.bytes_per_weight(name) if len(shapes.get(name, (0, 0))) > 1 else 4)
        for name, count in sizes.items()
    )


@click.command(cls=HerdCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Bundle directory to create.")
@click.option("--target", default="cpu", show_default=True,
              help=f"One of {', '.join(PRECISIONS)}; the last is not lowered, and portable.")
@click.option("--recipe", default="fp32", show_default=True,
              help=f"{recipes_by_target()}.")
@click.option("--kv", type=click.Choice(get_args(Caches)), default="float", show_default=True,
              help=f"Keys and values: {caches_by_target()}; 8 bits need --calibration.")
@click.option("--calibration", type=click.Path(path_type=Path),
              help="Directory that `herdgraph calibrate` wrote: fp8 needs it, 4-bit weights are rounded by it.")
@click.option("--sm", default="89,120", show_default=True, help="tensorrt-rtx: compute capabilities of one plan.")
@click.option("--profile", type=click.Choice(["both", "decode", "prefill"]), default="both", show_default=True,
              help="TensorRT: what the decoder's plan is for, which decides how experts are computed.")
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True,
              help="TensorRT: most sequences decoded together.")
@click.option("--context", type=click.IntRange(min=16), show_default="the model's, at most 131072",
              help="TensorRT: most tokens of a sequence.")
@click.option("--allow-fallback", is_flag=True, help="TensorRT: keep a plan whose FP8 products became 16-bit ones.")
@click.option("--shards", help="Split the decoder over ranks: tp=2,ep=4,pp=2, or auto with --devices.")
@click.option("--devices", help="What --shards auto plans for, such as 8xH100 or 8x80GB (see `herdgraph plan`).")
@click.option("--overwrite", is_flag=True, help="Replace an existing bundle.")
@click.option("--dry-run", is_flag=True, help="Check the checkpoint, print the memory plan and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document for scripts.")
def main(
    checkpoint: Path, output: Path, target: str, recipe: str, kv: str, calibration: Path | None, sm: str,
    shards: str | None, devices: str | None, overwrite: bool, dry_run: bool, as_json: bool, **limits: Any,
) -> None:
    """Build a bundle from a checkpoint.

    CHECKPOINT is a directory with a Llama 4 model in Hugging Face or Meta layout. Weights are streamed tensor by
    tensor: the memory needed does not grow with the model.
    """
    from herdgraph.export.targets.registry import target_of
    from herdgraph.export.targets.tensorrt.plans import PlanOptions, builder_of
    from herdgraph.model.checkpoint import open_checkpoint
    from herdgraph.model.quantization.calibration_file import calibration_for

    lowering, precision = target_of(target, recipe)
    lowering, precision = target_of(target, replace(precision, caches=kv))  # type: ignore[arg-type]
    plans = PlanOptions(sm=tuple(filter(None, sm.replace(" ", "").split(","))), **limits)
    if lowering.kind == "plan":
        builder_of(target, precision, plans)  # refused before anything is said or done
    with open_checkpoint(checkpoint) as source:
        calibration_for(precision, calibration, source)  # refused before anything is said or done
        split = _shards(shards, devices, source.config, lowering, precision, plans)
        plan = memory_plan(source.config, output, precision, split)
        objection = _preflight_error(source, output, plan, overwrite=overwrite)
        if objection and not dry_run:
            raise objection
        if not as_json:
            _show_plan(plan, checkpoint, lowering, precision, split, err=not dry_run)
        if dry_run:
            if as_json:
                emit_json(asdict(plan))
            if objection:
                print_warning(str(objection))
            return
        from herdgraph.export.pipeline import build_bundle

        started = time.perf_counter()
        with _progress_bar(quiet=as_json) as bar:
            bundle = build_bundle(
                source, output, target=target, recipe=precision, calibration=calibration, plans=plans, shards=split,
                overwrite=overwrite, progress=_hooks(bar),
            )
    seconds = time.perf_counter() - started
    if as_json:
        built = {"bundle": str(bundle.directory), "bytes": bundle.bytes, "seconds": round(seconds, 2)}
        emit_json(built | asdict(plan))
    else:
        succeed("built", f"{bundle.directory} ({size(bundle.bytes)}) in {seconds:.1f} s")


def _shards(
    text: str | None, devices: str | None, config: HerdConfig, target: Target, recipe: Recipe, plans: PlanOptions
) -> ShardPlan | None:
    """The plan that was asked for, checked before anything is said or done."""
    from herdgraph.export.sharded_build import check_shards
    from herdgraph.model.config.shard_plan import ShardPlan

    if (text == "auto") != (devices is not None):
        raise HerdError(f"--shards is {text or 'not given'} and --devices {devices or 'not given'}: give --devices "
                        "with --shards auto, and only then")
    if text is None:
        return None
    if devices is None:
        plan = ShardPlan.parse(text)
    else:
        from herdgraph.export.planner import choose

        plan = choose(config, recipe.name, devices, context=plans.context, batch=plans.batch,
                      kv=None if recipe.caches == "float" else recipe.caches)
    check_shards(plan, config, target)
    return plan


def _preflight_error(source: Checkpoint, output: Path, plan: MemoryPlan, *, overwrite: bool) -> HerdError | None:
    """Why the output cannot be written, known before the time that a capture takes."""
    from herdgraph.runtimes.bundle.manifest import MANIFEST

    try:
        check_output(output, overwrite=overwrite, mark=MANIFEST, inputs=[source.directory])
        carried = sum(path.stat().st_size for path in source.processor_files())
        require_room(output, plan.bundle_bytes + carried + _GRAPH_BYTES, "the bundle")
    except HerdError as error:
        return error
    return None


def _show_plan(
    plan: MemoryPlan, checkpoint: Path, target: Target, recipe: Recipe, shards: ShardPlan | None, *, err: bool
) -> None:
    ranks = {} if shards is None else {
        "shards": f"{shards}: {shards.world} ranks, the largest about {size(max(plan.rank_bytes))}"}
    free = "" if plan.free_bytes is None else f" ({size(plan.free_bytes)} free)"
    table("build plan", {
        "checkpoint": f"{checkpoint} ({quantity(plan.parameters)} parameters)",
        "target": f"{target.name}, recipe {recipe.name} ({recipe.purpose}): {target.purpose}",
        "bundle": f"about {size(plan.bundle_bytes)}{free}", **ranks,
        "peak memory": f"about {size(plan.peak_memory_bytes)}, whatever the number of layers and experts",
    }, err=err)


def _progress_bar(*, quiet: bool) -> ProgressBar:
    columns = (TextColumn("{task.description:32}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    return progress(*columns, quiet=quiet)


def _hooks(bar: ProgressBar) -> Progress:
    from herdgraph.export.pipeline import Progress

    task = bar.add_task("starting", total=None)
    return Progress(
        stage=lambda name: bar.update(task, description=name),
        weights=lambda total: bar.update(task, total=total),
        written=lambda count: bar.update(task, advance=count),
    )


if __name__ == "__main__":
    main()
