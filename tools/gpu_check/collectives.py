"""Step 6: NCCL, with one rank, and with two on one GPU, which takes them for two machines."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from typing import Any

from .check import Place, Report


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
    command = [sys.executable, "-m", f"{__package__}.nccl_rank"]
    hollow = ["hollow"] if place.device == "hollow" else []
    # Two ranks on one GPU of one host would be refused as a duplicate.
    started = [subprocess.Popen([*command, str(rank), str(world), folder, *hollow], stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, env=os.environ | {"NCCL_HOSTID": f"host{rank}"})
               for rank in range(world)]
    try:
        said = [process.communicate(timeout=max(1.0, place.left)) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, errors) in zip(started, said, strict=True):
        if process.returncode:
            raise RuntimeError(f"a rank ended with status {process.returncode}: {errors.decode()[-300:]}")
    return [json.loads(printed.splitlines()[-1]) for printed, _ in said]
