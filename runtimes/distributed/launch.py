"""Launching the ranks of a sharded engine.

* Usually rank 0, the process that loads the engine, starts the others on its own machine. They inherit a file in
  memory and nothing else: there is no port, and nothing that a crash could leave behind.
* Where ``RANK`` and ``WORLD_SIZE`` are set (torchrun, Ray, a batch system) every rank was started by somebody else and
  they meet at ``MASTER_ADDR``:``MASTER_PORT``. When all are on one machine they then open rank 0's file in memory and
  exchange through that; otherwise through torch.distributed.

Ranks on GPUs do the same, and then meet through NCCL, too (``nccl.py``).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from typing import IO, Any

from ...errors import HerdError
from ..bundle.manifest import Bundle
from .collectives import Collectives
from .options import ShardOptions
from .processes import Processes
from .shared_memory import SharedMemory, create, supported
from .stage import plan_of


def start(bundle: Bundle, options: ShardOptions) -> tuple[Collectives, Processes]:
    """Start the other ranks on this machine.

    Returns:
        This process's exchanges as rank 0, and the others' processes.

    Raises:
        HerdError: this machine cannot share memory as ranks need it.
    """
    if not supported():
        raise HerdError(f"ranks on one machine share memory, which {sys.platform} on this processor does not do in the "
                        "way they need: start every rank with torchrun")
    plan = plan_of(bundle)
    descriptor = create(plan.world)
    started: dict[int, subprocess.Popen[bytes]] = {}
    errors: dict[int, IO[bytes]] = {}
    for rank in range(1, plan.world):
        errors[rank] = tempfile.TemporaryFile()  # noqa: SIM115
        order = json.dumps({"bundle": str(bundle.directory.resolve()), "rank": rank, "descriptor": descriptor,
                            **asdict(options)})
        started[rank] = subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", f"{__package__}.worker", order], pass_fds=[descriptor],
            stdin=subprocess.DEVNULL, stdout=errors[rank], stderr=errors[rank])
    link = SharedMemory(descriptor, 0, plan.world, plan.group_of(0), timeout=options.timeout)
    for rank, process in started.items():
        link.expect(rank, process.pid)
    return link, Processes(started, errors)


def join(bundle: Bundle, options: ShardOptions) -> Collectives:
    """Meet the other ranks where the environment says.

    Raises:
        HerdError: another number of ranks than the bundle has, an address in use, or nobody comes.
    """
    from .gloo import Gloo, meet

    plan = plan_of(bundle)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world != plan.world:
        raise HerdError(f"{world} ranks were started, the bundle is split for {plan.world} ({plan}): start as many")
    meet(rank, world, options.timeout)
    gloo = Gloo(plan, rank, timeout=options.timeout)
    descriptor = _shared_descriptor(gloo)
    if descriptor is None:
        return gloo
    link = SharedMemory(descriptor, rank, world, plan.group_of(rank), timeout=options.timeout)
    link.barrier()
    gloo.close()  # all have met: what is left of it could only keep processes from ending
    return link


def _shared_descriptor(gloo: Any) -> int | None:
    """Rank 0's file in memory, opened by every rank; None unless all could open it."""
    rank = gloo.rank
    own = create(gloo.world) if rank == 0 and supported() else -1
    host, pid, number = gloo.gather((_host(), os.getpid(), own))[0]
    opened = own
    if rank and number >= 0 and host == _host():
        try:
            opened = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR)
        except OSError:
            opened = -1
    if min(gloo.gather(opened)) >= 0:
        return opened
    if opened >= 0:
        os.close(opened)
    return None


def _host() -> str:
    """What tells this machine's running system apart from others."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:  # noqa: PTH123
            return file.read()
    except OSError:
        return ""
