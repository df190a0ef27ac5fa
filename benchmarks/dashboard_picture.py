"""The panels of the Grafana dashboard as a picture, drawn from samples of ``/metrics`` under a short load.

    python -m benchmarks.dashboard_picture BUNDLE [--seconds 45] [-o docs/pictures/dashboard.png]

It is no screenshot of Grafana: the queries of ``deploy/grafana.json`` are computed here, rates over the last ten
samples. Only the forms of PromQL that the dashboard uses are known.
"""

from __future__ import annotations

import argparse
import json
import re
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from herdgraph.console import run_cli
from herdgraph.plotting import save

from .chats import ask_all
from .serving import ROOT, ours, served

WINDOW = 10
"""Samples of a rate, about a second apart."""
TIME = ("time", "")
_SAMPLE = re.compile(r"^([\w:]+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')
_AGGREGATE = re.compile(r"(?:sum|max)(?: by \((\w+)\))? ?\((rate\()?([\w:]+)")
_QUANTILE = re.compile(r"histogram_quantile\(([\d.]+), (.*)\)$")

Sample = dict[tuple[str, str], float]
"""Values by metric and labels as they are written, and when it was taken."""


def sampled(url: str, seconds: int, clients: int) -> list[Sample]:
    """``/metrics``, every second while clients come, stay, and go."""
    samples, until = [], time.monotonic() + seconds
    load = threading.Thread(target=_load, args=(url, until - seconds / 4, clients), daemon=True)
    load.start()
    while time.monotonic() < until:
        text = httpx.get(f"{url}/metrics", timeout=30).text
        samples.append({TIME: time.monotonic(),
                        **{(name, labels): float(value) for name, labels, value in _SAMPLE.findall(text)}})
        time.sleep(1)
    load.join()
    return samples


def _load(url: str, until: float, clients: int) -> None:
    turn = 0
    while time.monotonic() < until:
        turn += 1
        system = {"role": "system", "content": "You are a calf, and answer in a few words. " * 8}
        bodies = [{"messages": [system, {"role": "user", "content": f"{turn}, {seed}: what do you see?"}], "seed": seed,
                   "max_tokens": 16 + 24 * (seed % 5), "ignore_eos": True, "stream": seed % 4 > 0}
                  for seed in range(clients * 2)]
        ask_all(url, bodies, 1 + turn % 3 * clients // 2)


def series(query: str, samples: Sequence[Sample]) -> dict[str, list[float]]:
    """What a query gives at every sample, by the label that it keeps."""
    if quantile := _QUANTILE.match(query):
        buckets = _aggregated(quantile[2], samples)
        bounds = sorted(buckets, key=float)
        return {"": [_quantile(float(quantile[1]), bounds, [buckets[bound][at] for bound in bounds])
                     for at in range(len(samples))]}
    over, _, under = query.partition(" / ")
    values = _aggregated(over, samples)
    if not under:
        return values
    below = np.array(_aggregated(under, samples)[""])
    return {"": list(np.divide(values[""], below, out=np.full(len(below), np.nan), where=below > 0))}


def _aggregated(query: str, samples: Sequence[Sample]) -> dict[str, list[float]]:
    """``sum`` or ``max`` of a metric or of its rate."""
    found = _AGGREGATE.match(query)
    assert found, f"the dashboard has a new form of query: {query}"
    by, rate, metric = found.groups()
    sums: dict[str, np.ndarray[Any, Any]] = defaultdict(lambda: np.zeros(len(samples)))
    for at, sample in enumerate(samples):
        for (name, labels), value in sample.items():
            if name == metric:
                sums[dict(_LABEL.findall(labels)).get(by or "", "")][at] += value
    sums = sums or {"": np.zeros(len(samples))}
    times = np.array([sample[TIME] for sample in samples])
    return {key: list(_rate(values, times) if rate else values) for key, values in sums.items()}


def _rate(values: np.ndarray[Any, Any], times: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Growth per second over the window; 0 at the first sample."""
    before = (np.arange(len(values)) - WINDOW).clip(0)
    return (values - values[before]) / (times - times[before]).clip(1e-3)


def _quantile(share: float, bounds: Sequence[str], counts: Sequence[float]) -> float:
    """As Prometheus has it: linear within the bucket; the last finite bound where it lies beyond."""
    if not counts or counts[-1] <= 0:
        return float("nan")
    place = next(at for at, count in enumerate(counts) if count >= share * counts[-1])
    low = 0.0 if place == 0 else float(bounds[place - 1])
    if bounds[place] == "+Inf":
        return low
    below = counts[place - 1] if place else 0.0
    return low + (float(bounds[place]) - low) * (share * counts[-1] - below) / (counts[place] - below)


def drawn(samples: Sequence[Sample], bundle: str) -> Figure:
    """All panels, three in a row."""
    panels = [panel for panel in json.loads((ROOT / "deploy" / "grafana.json").read_text())["panels"]
              if panel.get("targets")]
    figure = Figure(figsize=(12, 2.3 * -(-len(panels) // 3)))
    for place, panel in enumerate(panels):
        _panel(figure.add_subplot(-(-len(panels) // 3), 3, place + 1), panel, samples)
    figure.suptitle(f"The queries of deploy/grafana.json, drawn from samples of /metrics ({bundle}); not Grafana",
                    fontsize=10, x=0.01, ha="left")
    return figure


def _panel(axes: Axes, panel: dict[str, Any], samples: Sequence[Sample]) -> None:
    seconds = [sample[TIME] - samples[0][TIME] for sample in samples]
    for target in panel["targets"]:
        for key, values in series(target["expr"], samples).items():
            axes.plot(seconds, values, label=re.sub(r"\{\{.*\}\}", key or "none", target["legendFormat"]), lw=1.2)
    unit = {"s": " (s)", "percentunit": " (share)"}.get(panel["fieldConfig"]["defaults"].get("unit", ""), "")
    axes.set_title(panel["title"] + unit, loc="left", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=7)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds", fontsize=7)
    axes.legend(fontsize=6, frameon=False, loc="upper right")


def main() -> None:
    """Parse, serve, sample, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--seconds", type=int, default=45)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/pictures/dashboard.png"))
    options = parser.parse_args()
    with served(ours(options.bundle, 1), options.clients, 0) as url:
        samples = sampled(url, options.seconds, options.clients)
    save(drawn(samples, options.bundle.name), options.output, dpi=80)


if __name__ == "__main__":
    run_cli(main)
