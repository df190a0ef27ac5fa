"""Two processes on one GPU, which NCCL is to take for two machines."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence

from .check import Place


def outputs_of(
    commands: Sequence[Sequence[str]], environments: Sequence[Mapping[str, str]], place: Place,
) -> list[bytes]:
    """What commands print that run at the same time; raises with the last words of one that failed.

    Args:
        commands: of ranks, in order.
        environments: of each, beside this process's own.
        place: says for how long.
    """
    # Two ranks on one GPU of one host would be refused as a duplicate.
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                env=os.environ | environment | {"NCCL_HOSTID": f"host{rank}"})
               for rank, (command, environment) in enumerate(zip(commands, environments, strict=True))]
    try:
        said = [process.communicate(timeout=max(1.0, place.left)) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, errors) in zip(started, said, strict=True):
        if process.returncode:
            raise RuntimeError(f"a rank ended with status {process.returncode}: {errors.decode()[-300:]}")
    return [printed for printed, _ in said]
