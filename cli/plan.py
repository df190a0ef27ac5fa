"""The plan command: which split of a model fits which devices, and how fast it would be."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..console import HerdCommand, emit_json, size, succeed, table
from ..errors import HerdError
from ..export.targets.precision import one_of
from ..model.quantization.recipes import RECIPES
from ..options import batch_option, context_option, json_option, kv_option, recipe_option
from .models import config_of

if TYPE_CHECKING:
    from ..export.planner import Candidate, PlanReport

_SHOWN = 12
_CONTEXT = 128 << 10


@click.command(cls=HerdCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", metavar="CHECKPOINT_OR_PRESET")
@click.option("--devices", required=True, help="8xH100, 2x8xH100 (machines x devices), 8x80GB (memory only) or cpu.")
@context_option("Tokens of a sequence", show_default="128k, or all that the model takes")
@batch_option("on all devices in all", most=1_000_000)
@recipe_option("fp8", one_of(RECIPES))
@kv_option("float is bfloat16 on GPUs, float32 on a CPU")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False),
              help="Write a picture: memory over the context, throughput over the batch.")
@json_option
def plan(
    model: str, devices: str, context: int | None, batch: int, recipe: str, kv: str, plot: Path | None, as_json: bool,
) -> None:
    """Plan how to split a model over devices.

    CHECKPOINT_OR_PRESET is a checkpoint directory (its configuration is read, no weights), the name of a released
    model such as meta-llama/Llama-4-Scout-17B-16E-Instruct, or scout, maverick, behemoth, tiny, tiny-text or calf.
    Behemoth's configuration is a guess: Meta never published it.
    """
    from ..export.planner import ServingSpec, Storage, Workload, make_report, parse_fleet

    cpu = devices.strip().lower() in ("cpu", "1xcpu")
    config = config_of(model)
    spec = ServingSpec(config, Storage.on(recipe, None if kv == "float" else kv, cpu=cpu),
                       Workload(context or min(_CONTEXT, config.text.max_position_embeddings), batch))
    report = make_report(spec, parse_fleet(devices))
    if plot:
        _draw(report, plot)
    if as_json:
        emit_json({"model": model, **report.to_json()})
    else:
        _show(model, report)


def _draw(report: PlanReport, path: Path) -> None:
    from ..export.planner.plot import draw

    try:
        draw(report, path)
    except ValueError as error:  # matplotlib names the formats that it knows
        raise HerdError(f"{path} cannot be drawn: {error}") from error
    succeed("drew", str(path))


def _show(model: str, report: PlanReport) -> None:
    """Four tables: the choice, the memory of a device, what was chosen from, and other contexts."""
    best, shown, rated = report.best, report.others[:_SHOWN], report.fleet.device.rated
    table(f"{model} on {report.fleet}", _choice(report))
    click.echo()
    table("memory of the fullest device", [
        *((part, size(count)) for part, count in best.parts.items() if count),
        ("all of it", f"{size(best.used)} of {size(best.usable)} to plan with ({best.used / best.usable:.0%})"),
    ])
    click.echo()
    header = ("", *(["tokens/s", "ms/token"] if rated else []), "GB/device", "collectives", *(["limit"] * rated))
    rows = [_columns(candidate, rated) for candidate in shown]
    table(f"plans ({len(shown)} of {len(report.others)})", _aligned(header, rows))
    if report.contexts:
        click.echo()
        table("what a context takes", _contexts(report))


def _choice(report: PlanReport) -> dict[str, str]:
    from ..export.planner.report import rate

    best, workload, storage = report.best, report.spec.workload, report.spec.storage
    device, decode, prefill = report.fleet.device, report.best.decode, report.prefill
    rates = {
        "decode": f"{rate(decode.tokens_per_second)} tokens/s in all, {1000 * decode.seconds:.1f} ms per token; "
                  f"limited by {decode.limit}",
        "prefill": f"{rate(prefill.tokens_per_second)} tokens/s, {prefill.seconds:.1f} s for a prompt that fills the "
                   f"context; limited by {prefill.limit}",
    }
    return {
        "plan": f"{best.plan}{f', {best.replicas} replicas' if best.replicas > 1 else ''}",
        "why": report.why,
        **(rates if device.rated else {}),
        "weights": f"{size(report.weight_bytes)} in {storage.recipe}",
        "asked for": f"{workload.batch} x {workload.context} tokens, keys and values in {storage.kv}",
        "device": f"{size(device.memory)}, {device.source}",
        **{f"note {number}": note for number, note in enumerate(report.notes, 1)},
    }


def _contexts(report: PlanReport) -> list[tuple[str, str]]:
    from ..export.planner.report import tokens

    return _aligned(
        ("", "keys and values", "devices for one", f"devices for {report.spec.workload.batch}"),
        [(tokens(row.context), size(row.cache_bytes), _count(row.devices), _count(row.batch_devices))
         for row in report.contexts],
    )


def _columns(candidate: Candidate, rated: bool) -> tuple[str, ...]:
    from ..export.planner.report import rate

    name = f"{candidate.plan} x {candidate.replicas}"
    memory, collectives = f"{candidate.used / 1e9:.1f}", str(candidate.collectives)
    if not candidate.fits:
        return (name, *(["-", "-"] if rated else []), memory, collectives, "does not fit")
    if not rated:
        return (name, memory, collectives)
    decode = candidate.decode
    return (name, rate(decode.tokens_per_second), f"{1000 * decode.seconds:.1f}", memory, collectives, decode.limit)


def _aligned(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[tuple[str, str]]:
    """Rows as a name and one text, its columns right-aligned under their header."""
    cells = [row[1:] for row in (header, *rows)]
    count = max(map(len, cells))
    widths = [max(len(row[i]) for row in cells if i < len(row)) for i in range(count)]
    texts = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=False)) for row in cells]
    return list(zip((row[0] for row in (header, *rows)), texts, strict=True))


def _count(devices: int) -> str:
    return str(devices) if devices else "no number"

