"""A process that runs cases and tells how each ended: one JSON line per case on standard output.

    python -m fuzz.worker SUBJECT FOLDER FIRST COUNT

What the case itself, a library or the C runtime writes to standard error is counted as extra lines, because a user
would see it before the one line of an error. The process that reads the lines ends this one when a case hangs or takes
too much memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from herdgraph.errors import HerdError

from .subjects import SUBJECTS, Subject

FULL = 1 << 30
"""Bytes that one case may add to the peak of the memory."""


def main() -> None:
    """Run the cases that the command line names."""
    name, folder, first, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    report = os.fdopen(os.dup(1), "w")
    subject = SUBJECTS[name]
    with tempfile.TemporaryFile() as spilled:
        os.dup2(spilled.fileno(), 1)
        os.dup2(spilled.fileno(), 2)
        base = subject.prepare(folder)
        for seed in range(first, first + count):
            print(json.dumps({"seed": seed, "begin": True}), file=report, flush=True)
            print(json.dumps({"seed": seed, **_outcome(subject, base, seed, spilled)}), file=report, flush=True)


def _outcome(subject: Subject, base: Path, seed: int, spilled: IO[bytes]) -> dict[str, str]:
    spilled.seek(0)
    spilled.truncate()
    _reset_peak()
    before = _peak()
    rng = random.Random(f"{subject.name} {seed}")
    names = {one.name for one in SUBJECTS.values()}
    parts = sorted(path for path in base.iterdir() if path.name in names) if subject.mixed else [base]
    with _scratch(rng.choice(parts)) as place:
        try:
            must_refuse = subject.run(place, rng)
            found = {"outcome": "silent acceptance" if must_refuse else "accepted", "told": must_refuse}
        except HerdError as error:
            found = {"outcome": "refused" if "\n" not in str(error) else "extra lines", "told": str(error)}
        except BaseException as error:
            found = {"outcome": "traceback", "told": "".join(traceback.format_exception(error))[-1500:]}
    sys.stdout.flush()
    sys.stderr.flush()
    spilled.seek(0)
    if extra := spilled.read():
        found = {"outcome": "extra lines", "told": extra[:500].decode(errors="replace")}
    if (grown := _peak() - before) > FULL:
        found = {"outcome": "memory", "told": f"{grown >> 20} MiB more; {found}"}
    return found


@contextlib.contextmanager
def _scratch(base: Path) -> Iterator[Path]:
    """A copy of the sound inputs, to be damaged."""
    place = Path(tempfile.mkdtemp(prefix="herdgraph-fuzz-"))
    try:
        shutil.copytree(base, place / base.name)
        yield place / base.name
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _reset_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
