"""A server as a process, to be abused: its address, its memory, and what it still does afterwards."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from herdgraph.errors import HerdError

ROOT = Path(__file__).parents[1]
_START_SECONDS = 60


@dataclass(frozen=True)
class Target:
    """A running server.

    Attributes:
        process: it.
        url: where it answers.
        log: what it says.
        bundle: what it serves.
    """

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    bundle: Path

    @property
    def port(self) -> int:
        """Where it listens, on loopback."""
        return int(self.url.rpartition(":")[2])

    def memory(self, name: str = "VmRSS") -> int:
        """Bytes that it has, or with ``VmHWM`` had at most."""
        text = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
        return int(found[1]) << 10 if found else 0

    def open_files(self) -> int:
        """Its files and connections."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def left(self) -> tuple[float, float, float]:
        """What it still does: requests running, waiting, and the share of the cache that they hold."""
        text = httpx.get(f"{self.url}/metrics", timeout=60).text
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        running, waiting, usage = (float(re.findall(rf"^vllm:{name}{{.*}} (\S+)$", text, re.MULTILINE)[0])
                                   for name in names)
        return running, waiting, usage


@contextmanager
def serving(bundle: Path, *options: str) -> Iterator[Target]:
    """``herdgraph serve`` on a free port, with one thread."""
    command = [sys.executable, "-m", "herdgraph", "serve", str(bundle), "--port", "0", "-t", "1", *options]
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "log"
        with log.open("wb") as stream, subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=stream) as process:
            try:
                yield Target(process, _address(process, log), log, bundle)
            finally:
                process.send_signal(signal.SIGKILL)


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    until = time.monotonic() + _START_SECONDS
    while time.monotonic() < until:
        text = log.read_text(encoding="utf-8", errors="replace")
        if found := re.search(r"^serving .* at (http://\S+)$", text, re.MULTILINE):
            return found[1]
        if process.poll() is not None:
            raise HerdError(f"the server ended at its start: {text[-500:]}")
        time.sleep(0.1)
    raise HerdError(f"the server did not say where it answers within {_START_SECONDS} s")
