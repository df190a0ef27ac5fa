"""What the planner predicts for this CPU beside what it does.

    python -m benchmarks.planner BUNDLE ... [--threads 1] [--prompt 512] [--new 24] [--batch 8] [--repeats 3] [--json]

Bandwidth and GEMM rates are measured in the same run as the bundle, and the prediction is made from them: what is
compared is the roofline and its efficiencies (``export/planner``), not the machine of another hour.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from herdgraph.console import stderr
from herdgraph.export.planner import Fleet, Storage, Workload, cpu_device, decode_rate, prefill_rate
from herdgraph.model.config.shard_plan import ShardPlan
from herdgraph.runtimes import Engine
from herdgraph.runtimes.benchmark.bench import BenchReport, bench


@dataclass(frozen=True)
class Row:
    """One rate in tokens per second."""

    bundle: str
    what: str
    measured: float
    predicted: float
    limit: str

    @property
    def ratio(self) -> float:
        """Predicted of measured."""
        return self.predicted / self.measured


def compared(bundle: Path, report: BenchReport) -> list[Row]:
    """Predictions for what a report measured, from the peaks in it."""
    engine = Engine.load(bundle, threads=report.peaks.threads or None, verify=False)
    config, int8 = engine.config, engine.new_sequence().cache.element_bytes < 2
    storage = Storage.on(engine.bundle.manifest.recipe, "int8" if int8 else None, cpu=True)
    fleet, whole = Fleet(cpu_device(peaks=report.peaks), 1, 1), ShardPlan()
    rates = {
        f"prefill of {report.prompt_tokens}": (
            report.prefill, prefill_rate(config, whole, storage, fleet, report.prompt_tokens)),
        f"decode at {report.context}": (
            report.decode, decode_rate(config, whole, storage, fleet, Workload(report.context, 1))),
    }
    if report.batch_decode:
        rates[f"{report.batch} together"] = (
            report.batch_decode, decode_rate(config, whole, storage, fleet, Workload(report.context, report.batch)))
    return [Row(bundle.name, what, measured.median, rate.tokens_per_second, rate.limit)
            for what, (measured, rate) in rates.items()]


def main() -> None:
    """Parse the command line, measure and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+")
    for name, default in (("threads", 1), ("prompt", 512), ("new", 24), ("batch", 8), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    options = {name: getattr(args, name) for name in ("threads", "prompt", "new", "batch", "repeats")}
    rows = []
    for bundle in args.bundles:
        with stderr.status(f"measuring {bundle}"):
            rows += compared(bundle, bench(bundle, **options))
    if args.json:
        print(json.dumps([asdict(row) | {"ratio": row.ratio} for row in rows]))
        return
    table = Table("bundle", "what", "measured", "predicted", "ratio", "limited by", title="tokens per second")
    for row in rows:
        figures = f"{row.measured:.1f}", f"{row.predicted:.1f}", f"{row.ratio:.2f}"
        table.add_row(row.bundle, row.what, *figures, row.limit)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
