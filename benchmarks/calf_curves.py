"""How the calf learned: the losses of tower and fusion by step, as a picture.

    python -m benchmarks.calf_curves [WORK] --plot FILE.png

WORK is where ``examples/calf/train.py`` works. The steps of the fusion's stages follow the tower's. Points are means of
some records, each of which is of one step.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean

from examples.calf.train import STAGES
from herdgraph.console import run_cli

from .figures import curves

TOWER = {"names": "tower: name", "meanings": "tower: meaning", "places": "tower: what lite0 sees by place",
         "lite0": "tower: what lite0 sees"}
RECORDS = 20
"""That are drawn as one point."""

Curve = list[tuple[float, float]]


def curve(metrics: Path, key: str, first: float = 0) -> Curve:
    """Means of one loss, by step."""
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    kept = [record for record in records if key in record]
    parts = [kept[at : at + RECORDS] for at in range(0, len(kept), RECORDS)]
    return [(first + part[-1]["step"], fmean(record[key] for record in part)) for part in parts]


def main() -> None:
    """Parse the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, nargs="?", default=Path(".cache/calf"))
    parser.add_argument("--plot", type=Path, required=True)
    args = parser.parse_args()
    drawn = {title: curve(args.work / "tower" / "metrics.jsonl", key) for key, title in TOWER.items()}
    last = drawn[TOWER["names"]][-1][0]
    for stage in STAGES:
        found = curve(args.work / stage.name / "metrics.jsonl", "loss", last)
        drawn[f"fusion, {stage.title}: next token"], last = found, found[-1][0]
    curves(args.plot, "How the calf learned", "step", "loss", drawn)


if __name__ == "__main__":
    run_cli(main)
