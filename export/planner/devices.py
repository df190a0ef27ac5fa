"""What plans run on: devices of the data file, this machine's CPU, or a number of bytes; and how many of them.

``devices.json`` holds figures of public data sheets and says where each comes from. No program reaches them: what is
taken for reachable is an ``Efficiency``, measured for the CPU and assumed for everything else.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ...errors import HerdError
from ...runtimes.benchmark.peaks import HardwarePeaks, measure_peaks

MOST_DEVICES = 100_000


@dataclass(frozen=True)
class Efficiency:
    """Shares of a device's rates that programs reach.

    Attributes:
        weights: share of the memory bandwidth that products reach while they read weights.
        caches: share of it that attention reaches while it reads keys and values.
        compute: share of the arithmetic rate.
        link: share of the bandwidth between devices.
        layer_seconds: what a layer's small operators cost per call, whatever their sizes.
    """

    weights: float
    caches: float
    compute: float
    link: float
    layer_seconds: float


ASSUMED = Efficiency(weights=0.7, caches=0.7, compute=0.5, link=0.8, layer_seconds=20e-6)
"""For GPUs, of which we have none: usual for well-made engines, not measured."""
ON_CPU = Efficiency(weights=0.72, caches=0.33, compute=0.75, link=1.0, layer_seconds=20e-6)
"""Of our own operators, as shares of ``runtimes/benchmark/peaks.py`` on the same machine: docs/planner.md compares."""
_IDEAL = Efficiency(weights=1.0, caches=1.0, compute=1.0, link=1.0, layer_seconds=0.0)


@dataclass(frozen=True)
class Device:
    """One device. Rates are per second; those of a device of which only the memory is known are not real.

    Attributes:
        name: as in the data file.
        memory: bytes.
        bandwidth: of the memory, bytes.
        flops: operations by type: fp32, bf16, fp8, int8; a type that is missing is computed in bf16, or fp32.
        link_bandwidth: to another device of the same machine, bytes in one direction.
        link_latency: of one step of a collective inside of a machine, seconds.
        network_bandwidth: to another machine, bytes in one direction.
        network_latency: of one step between machines, seconds.
        per_machine: devices of a machine.
        source: where the figures are from.
        efficiency: what is reached of them.
        rated: whether rates are known; otherwise a byte takes a second and all else no time, which compares plans.
    """

    name: str
    memory: float
    bandwidth: float = 1.0
    flops: Mapping[str, float] = field(default_factory=dict)
    link_bandwidth: float = math.inf
    link_latency: float = 0.0
    network_bandwidth: float = math.inf
    network_latency: float = 0.0
    per_machine: int = 8
    source: str = "memory only, as given"
    efficiency: Efficiency = ASSUMED
    rated: bool = True

    def computes(self, kind: str) -> str:
        """The type that products of a kind run in: itself, or the nearest that the device has."""
        return next((have for have in (kind, "bf16", "fp32") if have in self.flops), kind)

    def rate(self, kind: str) -> float:
        """Operations per second in the type that products of a kind run in; without end where no rate is known."""
        return self.flops.get(self.computes(kind), math.inf)


@dataclass(frozen=True)
class Fleet:
    """Devices of one kind in machines of equal size.

    Attributes:
        device: what each is.
        count: all of them.
        per_machine: devices of a machine; neighbours by number share one.
    """

    device: Device
    count: int
    per_machine: int

    def inside_machines(self, group: int) -> bool:
        """Whether groups of so many neighbours, from the first device on, never leave a machine."""
        return self.per_machine % group == 0 or self.count <= self.per_machine

    def __str__(self) -> str:
        return f"{self.count} x {self.device.name}"


@cache
def known_devices() -> dict[str, Device]:
    """The devices of the data file by name."""
    entries: list[dict[str, Any]] = json.loads(Path(__file__).with_name("devices.json").read_text("utf-8"))["devices"]
    return {entry["name"]: Device(**entry) for entry in entries}


def parse_fleet(text: str) -> Fleet:
    """Read ``8xH100``, ``2x8xH100`` (machines x devices), ``8x80GB`` (memory only), ``H100`` or ``cpu``.

    Raises:
        HerdError: no such device, or an impossible number.
    """
    match = re.fullmatch(r"(?:(\d+)x)?(?:(\d+)x)?(.+)", text.strip(), re.IGNORECASE)
    if match is None:
        raise HerdError("devices are empty: give for example 8xH100, 8x80GB or cpu")
    numbers = [int(number) for number in match.groups()[:2] if number is not None]
    if math.prod(numbers) not in range(1, MOST_DEVICES + 1):
        raise HerdError(f"{text} is {math.prod(numbers)} devices, it must be within 1 and {MOST_DEVICES}")
    if match[3].lower() == "cpu" and math.prod(numbers) > 1:
        raise HerdError(f"{text} asks for {math.prod(numbers)} of this machine: give cpu")
    device = _device(match[3])
    return Fleet(device, math.prod(numbers), numbers[1] if len(numbers) == 2 else device.per_machine)


def _device(name: str) -> Device:
    if memory := re.fullmatch(r"(\d+(?:\.\d+)?) ?(GB|GiB|TB)", name, re.IGNORECASE):
        size = float(memory[1]) * {"gb": 1e9, "gib": 2.0**30, "tb": 1e12}[memory[2].lower()]
        if not size:
            raise HerdError(f"a device of {name} holds nothing: give its memory")
        return Device(name, size, efficiency=_IDEAL, rated=False)
    if name.lower() == "cpu":
        return cpu_device()
    known = {_plain(one): device for one, device in known_devices().items()}
    if _plain(name) in known:
        return known[_plain(name)]
    near = [known[one].name for one in known if _plain(name) and one.startswith(_plain(name))]
    near = near or [known[one].name for one in difflib.get_close_matches(_plain(name), known, cutoff=0.5)]
    hint = f"did you mean {' or '.join(near)}" if near else f"choose among {', '.join(known_devices())}, cpu"
    raise HerdError(f"no device is called {name!r}: {hint}, or give its memory as in 8x80GB")


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def cpu_device(threads: int | None = None, peaks: HardwarePeaks | None = None) -> Device:
    """This machine as a device, its rates measured now (about three seconds).

    Args:
        threads: as for ``Engine.load``.
        peaks: rates, where they were measured already.
    """
    peaks = peaks or measure_peaks(threads)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Device(
        "cpu", memory, bandwidth=peaks.read_bandwidth, flops={"fp32": peaks.fp32_gemm, "int8": peaks.int8_gemm},
        per_machine=1, source="measured by runtimes/benchmark/peaks.py", efficiency=ON_CPU,
    )

