"""What happened on the hollow device, from the lines that its libraries wrote."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Event = dict[str, Any]


@dataclass
class Report:
    """The events between two marks."""

    events: list[Event] = field(default_factory=list)

    def of(self, *kinds: str) -> list[Event]:
        """Events of some kinds."""
        return [event for event in self.events if event["event"] in kinds]

    @property
    def kernels(self) -> list[str]:
        """Symbols of the kernels that were launched, in order."""
        return [event["kernel"] for event in self.of("launch")]

    @property
    def launches(self) -> int:
        """Kernels, products of cuBLAS, and fills: what a GPU is told to start."""
        return len(self.of("launch", "product", "fill"))

    @property
    def allocations(self) -> list[Event]:
        """What was allocated, on the device or pinned."""
        return self.of("allocate")

    def copies(self, source: str, target: str) -> list[Event]:
        """Copies between ``host``, ``pinned`` and ``device``."""
        return [event for event in self.of("copy") if (event["from"], event["to"]) == (source, target)]

    @property
    def reads_by_host(self) -> list[Event]:
        """Copies from the device to the host, each of which waits for all that came before."""
        return [*self.copies("device", "host"), *self.copies("device", "pinned")]

    @property
    def writes_by_host(self) -> list[Event]:
        """Copies from the host to the device."""
        return [*self.copies("host", "device"), *self.copies("pinned", "device")]

    def count(self, pattern: str) -> int:
        """How many launches have a symbol in which a regular expression is found."""
        return sum(bool(re.search(pattern, name)) for name in self.kernels)

    def summary(self) -> str:
        """One line per kind of kernel, for people."""
        names = Counter(short(name) for name in self.kernels)
        names.update(event["call"] for event in self.of("product"))
        copies = Counter(f"{event['from']} -> {event['to']}" for event in self.of("copy"))
        lines = [f"{count:4} {name}" for name, count in names.most_common()]
        return "\n".join([f"{self.launches} launches, copies {dict(copies)}, {len(self.allocations)} allocations, "
                          f"{len(self.of('synchronize'))} waits", *lines])


def reports(log: Path) -> dict[str, Report]:
    """Events by the mark before them."""
    with log.open() as lines:
        return by_mark(json.loads(line) for line in lines)


def by_mark(events: Iterable[Event]) -> dict[str, Report]:
    """See ``reports``; what comes before the first mark belongs to nothing."""
    found: dict[str, Report] = {}
    current = Report()
    for event in events:
        if event["event"] == "mark":
            current = found.setdefault(event["name"], Report())
        else:
            current.events.append(event)
    return found


def short(symbol: str) -> str:
    """The last two names of a C++ symbol, without template arguments; of CUTLASS's wrappers, what they wrap."""
    wrapped = re.search(r"Mainloop[A-Za-z0-9]+?Specialized|MoeFCGemm|GemmFpAIntB", symbol)
    if wrapped and symbol.startswith("_ZN7cutlass"):
        return f"cutlass::{wrapped[0]}"
    names, rest = [], re.sub(r"^_ZN?", "", symbol)
    while length := re.match(r"\d+", rest):
        end = length.end() + int(length[0])
        names.append(rest[length.end() : end])
        rest = rest[end:]
    return "::".join(names[-2:]) or symbol
