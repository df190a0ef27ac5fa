"""A bundle larger than the memory it may use: time per token against the share of the bundle that stays resident.

    python -m benchmarks.low_memory BUNDLE [--limits 0.3 0.5 0.8] [--tokens 30]

Each row runs ``Engine.load(..., memory="low")`` in a process of its own, in a control group (Linux, root) whose memory,
page cache included, is limited to a share of the bundle's size. The first row has no limit. Before each row the file is
dropped from the page cache: pages that are there already are charged to whoever read them.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from rich.table import Table

from herdgraph.console import fail, size, stderr

from .screen import show_tables

GROUPS = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


@contextmanager
def limited(limit: int) -> Iterator[Path]:
    """A control group that allows so many bytes; its directory."""
    root = next((path for path in GROUPS if os.access(path, os.W_OK)), None)
    if root is None:
        fail("no control group can be made here: run as root on Linux")
    group = root / f"herdgraph-{os.getpid()}"
    try:
        group.mkdir()
        old = group / "memory.limit_in_bytes"
        (old if old.exists() else group / "memory.max").write_text(str(limit))
    except OSError as error:
        fail(f"the memory of a control group cannot be limited here: {error}")
    try:
        yield group
    finally:
        group.rmdir()


def drop_from_page_cache(path: Path) -> None:
    """Forget the pages of a file."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(bundle: Path, tokens: int) -> dict[str, float]:
    """Decode in this process; per token milliseconds and page faults that waited for a device; resident file pages."""
    import resource  # not on Windows, which has no control groups either

    from herdgraph.runtimes import Engine

    started = time.perf_counter()
    engine = Engine.load(bundle, threads=1, memory="low")
    loaded = time.perf_counter() - started
    sequence, times, faults = engine.new_sequence(), list[float](), list[int]()
    for token in np.random.default_rng(0).integers(3, 1000, tokens).tolist():
        started = time.perf_counter()
        engine.decode(sequence, token)
        times.append(time.perf_counter() - started)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_majflt)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    pages = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssFile"))
    return {"load": loaded, "ms": 1e3 * float(np.median(times[5:])), "pages": pages,
            "faults": float(np.median(np.diff(faults)[4:]))}


def run(bundle: Path, tokens: int, group: Path | None) -> dict[str, float]:
    """The same in a process of its own, inside of a control group."""
    enter = f"echo $$ > {group}/cgroup.procs && " if group else ""
    words = [sys.executable, "-m", "benchmarks.low_memory", str(bundle), "--tokens", str(tokens), "--inside"]
    command = f"{enter}exec {shlex.join(words)}"
    done = subprocess.run(["sh", "-c", command], check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        fail(f"the process ended with {done.returncode}: the limit is too small for it")
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--limits", type=float, nargs="+", default=[0.8, 0.5, 0.3])
    parser.add_argument("--tokens", type=int, default=30)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        print(json.dumps(measure(args.bundle, args.tokens)))
        return
    whole = (args.bundle / "decoder.data").stat().st_size
    columns = ("memory limit", "load", "ms per token", "faults that wait", "resident pages", "share of the bundle")
    table = Table(*columns, title=str(args.bundle))
    for share in (None, *args.limits):
        stderr.print(f"[dim]limit {share}[/dim]")
        drop_from_page_cache(args.bundle / "decoder.data")
        if share is None:
            row, limit = run(args.bundle, args.tokens, None), "none"
        else:
            with limited(int(share * whole)) as group:
                row, limit = run(args.bundle, args.tokens, group), size(share * whole)
        pages = row["pages"]
        table.add_row(limit, f"{row['load']:.2f} s", f"{row['ms']:.0f}", f"{row['faults']:.0f}", size(pages),
                      f"{pages / whole:.0%}")
    show_tables(table)


if __name__ == "__main__":
    main()
