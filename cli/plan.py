"""The plan command: which split of a model fits which devices, and how fast it would be."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..console import HerdCommand, emit_json, size, succeed, table
from ..errors import HerdError
from ..export.targets.precision import one_of
from ..model.quantization.formats import CACHE_BYTES
from ..model.quantization.recipes import RECIPES

if TYPE_CHECKING:
    from ..export.planner import Candidate, PlanReport
    from ..model.config import HerdConfig

_SHOWN = 12
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20}


@click.command(cls=HerdCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", metavar="CHECKPOINT_OR_PRESET")
@click.option("--devices", required=True, help="8xH100, 2x8xH100 (machines x devices), 8x80GB (memory only) or cpu.")
@click.option("--context", default="128k", show_default=True, help="Tokens of a sequence; k is 1024, M is 1024k.")
@click.option("--batch", type=click.IntRange(1, 1_000_000), default=1, show_default=True,
              help="Sequences decoded at once, on all devices together.")
@click.option("--recipe", default="fp8", show_default=True, help=f"{one_of(RECIPES)}.")
@click.option("--kv", show_default="as the target computes", help=f"Keys and values: {one_of(CACHE_BYTES)}.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False),
              help="Write a picture: memory over the context, throughput over the batch.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def plan(
    model: str, devices: str, context: str, batch: int, recipe: str, kv: str | None, plot: Path | None, as_json: bool,
) -> None:
    """Plan how to split a model over devices.

    CHECKPOINT_OR_PRESET is a checkpoint directory (its configuration is read, no weights), or scout, maverick,
    behemoth, tiny or tiny-text. Behemoth's configuration is a guess: Meta never published it.
    """
    from ..export.planner import ServingSpec, Storage, Workload, make_report, parse_fleet

    config, length = _config_of(model), _tokens(context)
    cpu = devices.strip().lower() in ("cpu", "1xcpu")
    spec = ServingSpec(config, Storage.on(recipe, kv, cpu=cpu), Workload(length, batch))
    report = make_report(spec, parse_fleet(devices))
    if plot:
        _draw(report, plot)
    if as_json:
        emit_json({"model": model, **report.to_json()})
    else:
        _show(model, report)


def _config_of(model: str) -> HerdConfig:
    from ..model.config import read_config
    from ..model.config.presets import PRESETS, preset

    path = Path(model)
    if model in PRESETS and not path.exists():
        return preset(model)
    if path.name == model and not path.exists():
        raise HerdError(f"{model} is neither a directory nor a preset: give a checkpoint or one of "
                        f"{', '.join(PRESETS)}")
    return read_config(path)


def _tokens(text: str) -> int:
    """A number of tokens: 8192, 8k, 1M."""
    match = re.fullmatch(r"(\d{1,12})([kM]?)", text.strip(), re.IGNORECASE | re.ASCII)
    if not match:
        raise HerdError(f"context is {text!r}, a number of tokens is needed: 8192, 128k or 1M")
    return int(match[1]) * _UNITS[match[2].lower()]


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

