"""Step 6: NCCL, with one rank, and with two on one GPU, which takes them for two machines."""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from typing import Any

from .check import Place, Report
from .processes import outputs_of


def run(place: Place, report: Report) -> None:
    """What ``runtimes/distributed/libnccl.py`` calls, on data that is compared."""
    if importlib.util.find_spec("herdgraph.runtimes.distributed.libnccl") is None:
        report.skip("NCCL", "this version has no collectives for GPUs")
        return
    if place.device == "cpu":
        report.skip("NCCL", "it exchanges between GPUs")
        return
    for world in (1, 2):
        with report.attempt(f"NCCL, {world} ranks"), tempfile.TemporaryDirectory() as folder:
            for rank, found in enumerate(_ranks(world, folder, place)):
                version = found.pop("version")
                for name, holds in found.items():
                    report.holds(f"{name}, rank {rank} of {world}", holds, f"NCCL {version}")


def _ranks(world: int, folder: str, place: Place) -> list[dict[str, Any]]:
    """What every rank found; raises with its last line where one failed."""
    command, hollow = [sys.executable, "-m", f"{__package__}.nccl_rank"], ["hollow"] * (place.device == "hollow")
    commands = [[*command, str(rank), str(world), folder, *hollow] for rank in range(world)]
    return [json.loads(printed.splitlines()[-1]) for printed in outputs_of(commands, [{}] * world, place)]
