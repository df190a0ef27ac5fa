"""The bench command: how fast a bundle runs on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..console import HerdCommand, emit_json, size, stderr, table
from ..options import COUNT, PATH, TokenCount, batch_option, context_option, json_option
from .options import device_option, memory_option, threads_option

if TYPE_CHECKING:
    from ..runtimes.benchmark.bench import BenchReport


@click.command(cls=HerdCommand)
@click.argument("bundle", type=PATH)
@click.option("--prompt-tokens", "prompt", type=TokenCount(), default=512, show_default=True,
              help="Tokens of the prompt.")
@click.option("-n", "--new-tokens", "new", type=COUNT, default=32, show_default=True, help="Tokens to decode.")
@context_option("Tokens before the decoded ones", show_default="those of the prompt")
@batch_option("measured besides one alone")
@click.option("--repeats", type=COUNT, default=3, show_default=True, help="Repetitions; medians are reported.")
@threads_option
@memory_option
@device_option
@json_option
def bench(bundle: Path, as_json: bool, **options: Any) -> None:
    """Measure how fast BUNDLE is.

    Prefill and decode, and their utilization of the peaks of what it runs on, measured in the same run.
    """
    from ..runtimes.benchmark.bench import bench as measure

    with stderr.status("measuring"):
        report = measure(bundle, **options)
    if as_json:
        emit_json(report.to_json())
    else:
        table(f"{bundle}, {report.prompt_tokens} prompt tokens, decoding at {report.context}", _rows(report))


def _rows(report: BenchReport) -> dict[str, str]:
    """The report for people: medians, and the range of the repetitions in parentheses."""
    prefill, decode, limit = report.prefill, report.decode, report.peaks
    return {
        "load": f"{report.load_seconds:.2f} s",
        "time to first token": f"{report.first_token_seconds:.3f} s",
        "prefill": f"{prefill.median:.1f} tokens/s ({prefill.low:.1f} to {prefill.high:.1f}), "
                   f"{report.prefill_utilization:.2f} of the {limit.floats} GEMM peak",
        "decode": f"{decode.median:.1f} tokens/s ({decode.low:.1f} to {decode.high:.1f}), "
                  f"{report.decode_utilization:.2f} of the read bandwidth",
        **({f"decode, {report.batch} together": f"{both.median:.1f} tokens/s ({both.low:.1f} to {both.high:.1f})"}
           if (both := report.batch_decode) else {}),
        "peak memory": size(report.peak_bytes),
        "peaks": str(limit),
    }
