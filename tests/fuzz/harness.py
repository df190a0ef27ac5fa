"""Runs subjects in worker processes, ends what hangs, and counts how cases ended.

make fuzz                                  every subject in turn for an hour, then the table
python -m fuzz.harness --cases 300 images  one subject; seeds from --first on
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from .subjects import SUBJECTS

GOOD = ("refused", "accepted")
BAD = ("traceback", "extra lines", "hang", "crash", "memory", "silent acceptance")
HANG = 60.0
"""Seconds without a word, once the first case has begun."""
PREPARING = 600.0
"""Seconds that a worker may take before its first case: it imports torch and may build the sound inputs."""
LIMIT = 6 << 30
"""Resident bytes at which a worker is ended."""


@dataclass
class Tally:
    """How the cases of a subject ended, and what the bad ones said."""

    counts: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)

    def add(self, subject: str, seed: int, outcome: str, told: str) -> None:
        """Count a case."""
        self.counts[outcome] += 1
        if outcome in BAD:
            self.findings.append(f"{subject} {seed}: {outcome}: {told}")


def run_cases(subject: str, folder: Path, first: int, count: int, *, hang: float = HANG) -> Tally:
    """Run some cases of a subject; a worker that is ended or dies is followed by another from the next seed on."""
    tally, at, end = Tally(), first, first + count
    while at < end:
        for seed, outcome, told in _worker(subject, folder, at, end - at, hang):
            tally.add(subject, seed, outcome, told)
            at = seed + 1
    return tally


def _worker(subject: str, folder: Path, first: int, count: int, hang: float) -> Iterator[tuple[int, str, str]]:
    command = [sys.executable, "-m", "fuzz.worker", subject, str(folder), str(first), str(count)]
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": f"{root}:{root.parent}:{os.environ.get('PYTHONPATH', '')}"}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
        env=environment,
        cwd=root.parent,
    )
    running, ending = first, ""
    try:
        for line in _lines(process, hang):
            if line in ("hang", "memory"):
                ending = line
                break
            told = json.loads(line)
            if told.get("begin"):
                running = told["seed"]
            else:
                yield told["seed"], told["outcome"], told["told"]
                running = told["seed"] + 1
    finally:
        process.kill()
        status = process.wait()
    if running < first + count:
        yield running, ending or "crash", "" if ending else f"status {status}"


def _lines(process: subprocess.Popen[bytes], hang: float) -> Iterator[str]:
    """What a worker says; ``hang`` or ``memory`` when it has to be ended."""
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    buffered, heard, limit = b"", time.monotonic(), PREPARING
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            if selector.select(timeout=0.2):
                read = process.stdout.read(1 << 16)
                if not read:
                    return
                buffered, heard, limit = buffered + read, time.monotonic(), hang
                *lines, buffered = buffered.split(b"\n")
                yield from (line.decode() for line in lines)
            if _resident(process.pid) > LIMIT:
                yield "memory"
            if time.monotonic() - heard > limit:
                yield "hang"


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    except (OSError, IndexError):
        return 0


def show(tallies: dict[str, Tally]) -> None:
    """Print the table, then every finding."""
    table = Table("subject", "cases", *GOOD, *BAD)
    for name, tally in tallies.items():
        row = [tally.counts[outcome] for outcome in (*GOOD, *BAD)]
        table.add_row(name, str(sum(row)), *map(str, row))
    total = [sum(tally.counts[outcome] for tally in tallies.values()) for outcome in (*GOOD, *BAD)]
    table.add_row("total", str(sum(total)), *map(str, total), style="bold")
    Console(width=150).print(table)
    for tally in tallies.values():
        for finding in tally.findings:
            print(finding)


@click.command()
@click.argument("names", nargs=-1, metavar="[SUBJECT]...")
@click.option("--cases", type=int, help="Cases of every subject, instead of a time.")
@click.option("--minutes", type=float, default=60.0, show_default=True, help="Time for all of them.")
@click.option("--first", type=int, default=1_000_000, show_default=True, help="First seed; `make test` begins at 0.")
def main(names: tuple[str, ...], cases: int | None, minutes: float, first: int) -> None:
    """Damage inputs of the SUBJECTS (all) and show how herdgraph takes it."""
    tallies = {name: Tally() for name in names or SUBJECTS if names or name != "mixed"}
    end, rounds = time.monotonic() + 60 * minutes, 0
    with tempfile.TemporaryDirectory(prefix="herdgraph-fuzz-base-") as folder:
        while rounds == 0 or (cases is None and time.monotonic() < end):
            for name, tally in tallies.items():
                count = cases or 100
                found = run_cases(name, Path(folder), first + rounds * count, count)
                tally.counts += found.counts
                tally.findings += found.findings
                click.echo(f"{name}: {dict(tally.counts)}", err=True)
            rounds += 1
    show(tallies)
    sys.exit(any(tally.findings for tally in tallies.values()))


if __name__ == "__main__":
    main()
