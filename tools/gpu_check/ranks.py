"""Step 7: a tiny model split over two ranks on one GPU, against what the whole model said on a CPU in float32.

Its tokens are recorded: partitions of ONNX Runtime and exchanges of NCCL in one CUDA graph.
"""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

from .artifacts import HERDS, RANKS, target_for
from .check import Place, Report
from .processes import outputs_of
from .tiny_herds import judge

WORLD = 2


def run(place: Place, report: Report) -> None:
    """The bundle that was made for the device."""
    if place.device == "hollow":
        report.skip("two ranks", "`make test-cuda` runs them on hollow devices")
        return
    (bundle,) = (place.artifacts / HERDS / RANKS).glob(f"{target_for(place.device)}-*-tp=2")
    with report.attempt("two ranks"):
        for part, error, others in _found(bundle, place):
            judge(place, report, bundle, part, error, others)


def _found(bundle: Path, place: Place) -> list[tuple[str, float, float]]:
    """What rank 0 measured."""
    command = [sys.executable, "-m", f"{__package__}.rank_process", str(bundle), place.device]
    port = str(_free_port())
    ranks = [{"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": port} for rank in range(WORLD)]
    printed = outputs_of([command] * WORLD, ranks, place)
    found: list[tuple[str, float, float]] = json.loads(printed[0].splitlines()[-1])
    return found


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
