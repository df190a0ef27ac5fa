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
_ABOVE = 1.5
"""Times the memory to plan with that the picture shows."""
_THINNEST = 0.015
"""Share of the picture's height below which a part is not seen."""
_COLORS = ("#bdbdbd", "#3b6ea8", "#d1793a", "#5a9b5a", "#8a6bb1", "#c9b037", "#7f5539", "#d98cb3", "#56b4c4", "#444444")


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
    """Stacked bytes of the fullest device, with the batch of the report; what is far beyond the device is cut off."""
    spec, best = report.spec, report.best
    contexts = _doubling(_SHORTEST, spec.config.text.max_position_embeddings)
    found = [fullest_rank(spec.config, best.plan, spec.storage, _shared(spec, best, context)) for context in contexts]
    top = min(1.05 * max(sum(parts.values()) for parts in found), _ABOVE * best.usable)
    stack = _visible(found, top)
    axes.stackplot(contexts, [[size / 1e9 for size in sizes] for sizes in stack.values()], labels=list(stack),
                   colors=_COLORS)
    axes.axhline(best.usable / 1e9, color="black", linestyle="--", linewidth=1)
    axes.annotate(f"{best.usable / 1e9:.0f} GB to plan with", (contexts[0], best.usable / 1e9), (5, 3),
                  textcoords="offset points", fontsize=8)
    axes.set(xscale="log", xlabel="tokens of a sequence", ylabel="GB on the fullest device",
             xlim=(contexts[0], contexts[-1]), ylim=(0, max(top, 1.1 * best.usable) / 1e9))
    axes.set_title(f"{best.plan} x {best.replicas}, batch {spec.workload.batch}", loc="left", fontsize=10)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tokens(round(value))))
    axes.set_xticks(contexts[::2])
    axes.minorticks_off()
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, 0.93), reverse=True)


def _visible(found: list[dict[str, float]], top: float) -> dict[str, list[float]]:
    """Bytes of parts by context, from the bottom up. Parts too thin to be seen below ``top`` are one, the lowest."""
    names = dict.fromkeys(name for each in found for name in each)
    parts = {name: [each.get(name, 0.0) for each in found] for name in names}
    shown = [at for at, each in enumerate(found) if at == 0 or sum(each.values()) <= top]
    thick = [name for name, sizes in parts.items() if max(sizes[at] for at in shown) > _THINNEST * top]
    thin = [sizes for name, sizes in parts.items() if name not in thick]
    rest = {f"{len(thin)} smaller parts": [sum(sizes) for sizes in zip(*thin, strict=True)]} if thin else {}
    return rest | {name: parts[name] for name in thick}


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
