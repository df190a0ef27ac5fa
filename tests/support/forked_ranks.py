"""Starts ranks as torchrun does, with one import of torch for all: ``python -m support.forked_ranks RANKS MODULE ...``.

A rank started by torchrun imports for four seconds. Here a parent imports the worker once, then forks the ranks and
calls its ``main``; what a rank is told by its environment is the same. The parent has no thread and computes nothing.
Ranks that torchrun starts itself are those of ``test_distill_ranks.py`` and ``test_sharded_engine.py``.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from importlib import import_module

from support.processes import worker_environment


def run_ranks(ranks: int, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run so many ranks of a worker, and wait; its ``main`` finds the arguments behind the name in ``sys.argv``."""
    return subprocess.run([sys.executable, "-m", "support.forked_ranks", str(ranks), module, *arguments],
                          capture_output=True, text=True, check=False, timeout=1200, env=worker_environment())


def main() -> None:
    """Fork the ranks; if one fails, the others are ended, since they would wait for it. One alone is not forked."""
    ranks, worker = int(sys.argv[1]), import_module(sys.argv[2])
    sys.argv = sys.argv[2:]
    if ranks == 1:
        worker.main()
        return
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    os.environ |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    running = {_fork(rank, worker.main) for rank in range(ranks)}
    failed = False
    while running:
        process, status = os.wait()
        running.remove(process)
        if status and not failed:
            failed = True
            for other in running:
                os.kill(other, signal.SIGTERM)
    sys.exit(failed)


def _fork(rank: int, work: Callable[[], None]) -> int:
    process = os.fork()
    if process:
        return process
    status = 1
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    try:
        work()
        status = 0
    except SystemExit as error:
        status = int(bool(error.code))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
