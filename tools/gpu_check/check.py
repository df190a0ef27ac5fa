"""What a step finds: checks, each a line of JSON as soon as it is known, so that a crash later takes none of them."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

Device = str
"""``cuda``: a GPU; ``hollow``: stub libraries that compute nothing; ``cpu``: the CPU provider, in float32."""


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        status: ``passed``, ``failed``, ``skipped`` or ``measured``.
        value: a number, or None.
        limit: that the number must not exceed, or None.
        note: for people.
    """

    name: str
    status: str
    value: float | None = None
    limit: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Place:
    """Where a step runs.

    Attributes:
        device: see ``Device``.
        artifacts: files that were made before, see ``artifacts.py``.
        deadline: as ``time.monotonic`` counts: a step that measures more and more stops here.
    """

    device: Device
    artifacts: Path
    deadline: float

    @property
    def real(self) -> bool:
        """Whether numbers mean something: a hollow device computes none."""
        return self.device != "hollow"

    @property
    def timed(self) -> bool:
        """Whether times mean something."""
        return self.device == "cuda"

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()


class Report:
    """Writes checks to standard output, of which nothing else of the process gets hold."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)  # what libraries print goes to standard error

    def add(self, check: Check) -> None:
        """Write a check down."""
        self._out.write(json.dumps(asdict(check)) + "\n")
        self._out.flush()

    def error(self, name: str, value: float, limit: float, *, real: bool = True) -> None:
        """A relative error that must stay below a limit; on a hollow device only that there is one."""
        if not real:
            self.add(Check(name, "passed", None, limit, "ran on the hollow device"))
            return
        passed = math.isfinite(value) and value <= limit
        self.add(Check(name, "passed" if passed else "failed", value, limit))

    def holds(self, name: str, truth: bool, note: str = "") -> None:
        """Something that has to be true."""
        self.add(Check(name, "passed" if truth else "failed", note=note))

    def measure(self, name: str, value: float, note: str = "", *, timed: bool = True) -> None:
        """A measured number with its unit in the name; where times mean nothing, only that it ran."""
        self.add(Check(name, "measured", value, note=note) if timed else Check(name, "passed", note="ran"))

    def skip(self, name: str, why: str) -> None:
        """Something that cannot be looked at here."""
        self.add(Check(name, "skipped", note=why))

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """What raises is a failed check, and the step goes on."""
        try:
            yield
        except Exception as error:  # whatever onnxruntime, NCCL or CUDA say
            text = " ".join(str(error).split())
            self.add(Check(name, "failed", note=f"{type(error).__name__}: {text[:300]}"))
            sys.stderr.write(f"{name}: {error}\n")

