"""One step in a process of its own: ``python -m gpu_check.step NAME --device cuda --artifacts DIR --seconds 60``."""

from __future__ import annotations

import argparse
import importlib
import time
from pathlib import Path

from .check import Place, Report
from .hollow import preload_hollow


def main() -> None:
    """Run the step's ``run(place, report)``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--artifacts", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60)
    wanted = parser.parse_args()
    report = Report()
    # A step stops by itself a little before it would be ended.
    place = Place(wanted.device, wanted.artifacts, time.monotonic() + 0.9 * wanted.seconds)
    if place.device == "hollow":
        preload_hollow()
    with report.attempt(wanted.name):
        importlib.import_module(f".{wanted.name}", __package__).run(place, report)


if __name__ == "__main__":
    main()
