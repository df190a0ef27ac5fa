"""Launching the ranks of a sharded engine, and what every rank does before it serves.

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
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from collections.abc import Sequence as Items
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import IO, Any

import numpy as np

from ...errors import HerdError
from ...files import sha256_of
from ...model.config.shard_plan import ShardPlan
from ..bundle.manifest import MANIFEST, Bundle
from ..executors.options import ExecutorOptions
from ..executors.ort.load import begin_copy
from ..executors.ort.weights import verified
from ..executors.tensorrt.rank_plan import load_rank_plan
from ..kv_cache.pool import free_cache_bytes
from .collectives import TIMEOUT, Collectives
from .rank_runner import RankGraph, load_rank_graph
from .shared_memory import SharedMemory, alive, create, supported
from .stage import Shard

LOADERS: dict[str, Callable[[Bundle, Collectives, ExecutorOptions], Shard]] = {
    "onnxruntime": load_rank_graph, "tensorrt": load_rank_plan,
}
"""By executor, what loads a rank's part."""
EXIT_REPORTED = 3
"""Exit status of a rank that has told the others why it ends."""
_LAST_WORDS = 300


@dataclass(frozen=True)
class ShardOptions:
    """How a rank loads and serves.

    Attributes:
        threads: threads of one operator on every rank.
        verify: compare this rank's files with their hashes.
        prepack: copy weights into the layout that is fastest; see ``ExecutorOptions``.
        timeout: seconds that a rank may keep the others waiting in the middle of a call.
        devices: per rank the cores that it may use, such as ``0-3,8``; empty for any.
        cache_bytes: of a rank; see ``ExecutorOptions``.
    """

    threads: int
    verify: bool = True
    prepack: bool = True
    timeout: float = TIMEOUT
    devices: tuple[str, ...] = ()
    cache_bytes: int | None = None


def plan_of(bundle: Bundle) -> ShardPlan:
    """How a sharded bundle is split."""
    assert bundle.manifest.shards is not None, "a whole bundle has no ranks"
    return bundle.manifest.shards.plan


def load_shard(bundle: Bundle, link: Collectives, options: ShardOptions) -> Shard:
    """What a rank loads; every rank calls it, and none goes on before all have loaded.

    Raises:
        HerdError: this rank has another bundle than rank 0, or files that were altered.
    """
    _check_same_bundle(bundle, link)
    if options.devices:
        os.sched_setaffinity(0, cores(options.devices[link.rank]))
    loading = ExecutorOptions(options.threads, options.prepack, options.verify, _cache_bytes(link, options))
    with verified(bundle, bundle.files_of(link.rank), loading):
        shard = LOADERS[bundle.manifest.executor](bundle, link, loading)
    if isinstance(shard.stage, RankGraph):
        begin_copy(shard.runner, shard.stage.weights, loading)
    link.barrier()
    return shard


def _check_same_bundle(bundle: Bundle, link: Collectives) -> None:
    mine = sha256_of(bundle.directory / MANIFEST)
    theirs = np.frombuffer(bytes.fromhex(mine), np.uint8).copy()
    link.broadcast(theirs)
    if (found := theirs.tobytes().hex()) != mine:
        raise HerdError(f"{bundle.directory} is another bundle than rank 0 has: its manifest is {mine[:12]}…, rank 0's "
                        f"is {found[:12]}…; copy the same bundle to every machine")


def _cache_bytes(link: Collectives, options: ShardOptions) -> int:
    """What keys and values may use on every rank: as rank 0 says, which decides about the blocks of all."""
    count = np.array([free_cache_bytes() if options.cache_bytes is None else options.cache_bytes], np.int64)
    link.broadcast(count)
    return int(count[0])


def cores(text: str) -> set[int]:
    """Cores of a list such as ``0-3,8``.

    Raises:
        HerdError: not such a list.
    """
    found: set[int] = set()
    for part in str(text).split(","):
        first, _, last = part.partition("-")
        if not first.strip().isdecimal() or (last and not last.strip().isdecimal()):
            raise HerdError(f"{text!r} is no list of cores: write it as 0-3,8")
        found |= set(range(int(first), int(last or first) + 1))
    return found


class Processes:
    """The ranks that rank 0 has started.

    Args:
        started: by rank.
        errors: what each wrote to standard error.
    """

    def __init__(self, started: dict[int, subprocess.Popen[bytes]], errors: dict[int, IO[bytes]]) -> None:
        self.started, self._errors = started, errors

    def exit_report(self) -> str:
        """How ranks ended that did not say why themselves; empty when none did."""
        for process in self.started.values():
            if not alive(process.pid):  # its last threads may still be ending, and only then it says how
                with suppress(subprocess.TimeoutExpired):
                    process.wait(1.0)
        ended = {rank: code for rank, process in self.started.items()
                 if (code := process.poll()) not in (None, 0, EXIT_REPORTED)}
        return "; ".join(f"rank {rank} (process {self.started[rank].pid}) {self._how(rank, code)}"
                         for rank, code in ended.items())

    def _how(self, rank: int, code: int) -> str:
        if code < 0:
            name = signal.Signals(-code).name
            return f"was killed by {name}" + (", perhaps for lack of memory" if code == -signal.SIGKILL else "")
        self._errors[rank].seek(0)
        lines = self._errors[rank].read().decode(errors="replace").strip().splitlines()
        return f"ended with status {code}" + (f": {lines[-1][:_LAST_WORDS]}" if lines else "")

    def stop(self, grace: float) -> None:
        """Wait for them to end by themselves, then end them."""
        for process in self.started.values():
            try:
                process.wait(grace)
            except subprocess.TimeoutExpired:
                grace = 0
                process.kill()  # a stopped process would not hear anything gentler
                process.wait()
        for file in self._errors.values():
            file.close()


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


def launched_externally() -> bool:
    """Whether somebody else has started this process as one of several ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


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


def abandon(error: BaseException, link: Collectives, processes: Processes | None) -> str:
    """Let the other ranks end after a failure; what is known of it."""
    reason = str(error) if isinstance(error, HerdError) else f"rank 0 was interrupted by {type(error).__name__}"
    link.fail(reason)
    exit_report = processes.exit_report() if processes else ""
    if processes:
        processes.stop(0.0)
    link.close()
    return exit_report or reason


def threads_of(threads: int | None, ranks: int) -> int:
    """Threads of a rank: as asked, or the machine's cores shared by the ranks on it."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks)) if launched_externally() else ranks
    return threads or max(1, (os.cpu_count() or 1) // max(1, local))


def check_devices(devices: Items[str] | None, ranks: int) -> tuple[str, ...]:
    """Devices of the ranks.

    Raises:
        HerdError: the bundle is whole, another number than ranks, or not lists of cores.
    """
    if devices is None:
        return ()
    if ranks == 1:
        raise HerdError("devices were given, but the bundle is not sharded: build it with --shards")
    if len(devices) != ranks:
        raise HerdError(f"{len(devices)} devices were given, the bundle is split for {ranks}: give one for each")
    for text in devices:
        cores(text)
    return tuple(devices)
