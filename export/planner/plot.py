"""The picture of a report: memory of the fullest device over the context, and throughput over the batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from .memory import Workload, fullest_rank
from .report import PlanReport, tokens
from .roofline import decode_rate
from .search import Candidate, ServingSpec

_SHORTEST, _LARGEST_BATCH = 8 << 10, 256
_LINES = 3


def draw(report: PlanReport, path: Path) -> None:
    """Write the picture of a report, in the format of the file's suffix."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    _memory(left, report)
    if report.fleet.device.rated:
        _throughput(right, report)
    else:
        right.text(0.5, 0.5, "rates of these devices are not known", ha="center", transform=right.transAxes)
        right.set_axis_off()
    figure.savefig(path, dpi=110)


def _memory(axes: Any, report: PlanReport) -> None:
    """Stacked bytes of the fullest device, with the batch of the report."""
    spec, best = report.spec, report.best
    contexts = _doubling(_SHORTEST, spec.config.text.max_position_embeddings)
    parts = [fullest_rank(spec.config, best.plan, spec.storage, _shared(spec, best, context)) for context in contexts]
    names = list(dict.fromkeys(name for found in parts for name in found))
    axes.stackplot(contexts, [[found.get(name, 0) / 1e9 for found in parts] for name in names], labels=names, alpha=0.8)
    axes.axhline(best.usable / 1e9, color="black", linestyle="--", linewidth=1, label="to plan with")
    axes.set(xscale="log", xlabel="tokens of a sequence", ylabel="GB on the fullest device", ylim=(0, None))
    axes.set_title(f"{best.plan} x {best.replicas}, batch {spec.workload.batch}", loc="left", fontsize=10)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tokens(round(value))))
    axes.set_xticks(contexts[::2])
    axes.minorticks_off()
    axes.legend(fontsize=7, frameon=False, loc="upper left", reverse=True)


def _shared(spec: ServingSpec, candidate: Candidate, context: int) -> Workload:
    return replace(spec.shared_by(candidate.replicas), context=context)


def _throughput(axes: Any, report: PlanReport) -> None:
    """Tokens per second of the best plans over the batch, as far as it fits."""
    spec, fleet = report.spec, report.fleet
    for candidate in [one for one in report.others if one.fits][:_LINES]:
        points = []
        for batch in _doubling(1, _LARGEST_BATCH):
            replicas = min(batch, fleet.count // candidate.plan.world)
            asked = ServingSpec(spec.config, spec.storage, Workload(spec.workload.context, batch))
            parts = fullest_rank(spec.config, candidate.plan, spec.storage, asked.shared_by(replicas))
            if sum(parts.values()) > candidate.usable:
                break
            rate = decode_rate(spec.config, candidate.plan, spec.storage, fleet, asked.workload, replicas)
            points.append((batch, rate.tokens_per_second))
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4,
                  label=f"{candidate.plan} x {fleet.count // candidate.plan.world}")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.set(xlabel="sequences decoded together", ylabel="tokens/s, predicted", ylim=(0, None))
    axes.set_title(f"{fleet}, context {tokens(spec.workload.context)}", loc="left", fontsize=10)
    axes.legend(fontsize=8, frameon=False)


def _doubling(first: int, last: int) -> list[int]:
    """first, 2 first, 4 first, ... and last."""
    found = [min(first, last)]
    while found[-1] * 2 <= last:
        found.append(found[-1] * 2)
    return found if found[-1] == last else [*found, last]
