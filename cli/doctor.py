"""The doctor command: what this machine has, what runs and builds on it, and what to install for the rest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Any

import click

from ..console import HerdCommand, emit_json, fail, print_warning, size, table
from ..options import json_option

if TYPE_CHECKING:
    from ..export.targets.readiness import Readiness
    from ..runtimes.machine.machine import Machine


@click.command(cls=HerdCommand)
@json_option
def doctor(as_json: bool) -> None:
    """Say what runs and builds on this machine, and what to install for the rest.

    Looks at the processor, the packages, the NVIDIA driver and its GPUs, and tries every execution provider of ONNX
    Runtime with a product of two numbers. Exit status 1 when no target runs here.
    """
    from ..export.targets.readiness import readiness
    from ..runtimes.machine.machine import this_machine

    machine = this_machine()
    found = readiness(machine)
    if as_json:
        emit_json({**machine.to_json(), "targets": [_as_json(row) for row in found]})
    else:
        _show(machine, found)
    if all(row.to_run for row in found):
        fail(f"no target runs on this machine: {found[0].to_run[0]}")


def _as_json(row: Readiness) -> dict[str, Any]:
    return {**asdict(row), "runs": not row.to_run, "builds": not row.to_build}


def _show(machine: Machine, found: list[Readiness]) -> None:
    for title, rows in (("machine", _host(machine)), ("ONNX Runtime", _onnxruntime(machine)),
                        ("NVIDIA", _nvidia(machine)), ("packages", _packages(machine)), ("targets", _targets(found))):
        table(title, rows)
        click.echo()
    for text in machine.warnings:
        print_warning(text)


def _host(machine: Machine) -> dict[str, str]:
    host, operators = machine.host, machine.operators
    unit = operators.unit or operators.problem or "not compiled here"
    return {
        "system": f"{host.system}, {host.architecture}",
        "processor": f"{host.processor}, {host.cores} cores; {' '.join(host.instruction_sets) or 'sets not told'}",
        "memory": f"{size(host.memory)}, {size(host.available)} of it available" if host.memory else "not told",
        "Python": f"{host.python}, {host.executable}",
        "own operators": f"unit {unit}" if operators.unit else unit,
    }


def _onnxruntime(machine: Machine) -> Iterator[tuple[str, str]]:
    package, providers = machine.cuda.onnxruntime, machine.providers
    cuda = f", built with CUDA {'.'.join(map(str, package.cuda))}" if package.cuda else ""
    yield "package", f"{package.package} {package.version}{cuda}" if package.package else "not installed"
    if providers.problem and package.package:
        yield "import", providers.problem
    for name, problem in providers.problems.items():
        yield name, problem or "works"


def _nvidia(machine: Machine) -> Iterator[tuple[str, str]]:
    driver = machine.cuda.driver
    release = f"release {driver.release}, " if driver.release else ""
    yield "driver", (f"{release}CUDA {'.'.join(map(str, driver.cuda))}" if driver.cuda else "none") + (
        f" ({driver.problem})" if driver.problem else "")
    for gpu in driver.gpus:
        yield f"cuda:{gpu.index}", f"{gpu.name}, SM {gpu.sm}, {size(gpu.memory)}"
    for library in machine.cuda.libraries.values():
        yield library.name, library.path if library.path and not library.problem else "not here"


def _packages(machine: Machine) -> Iterator[tuple[str, str]]:
    yield from machine.packages.items()
    for extra in machine.extras.values():
        yield f"[{extra.name}]", "complete" if not extra.problems else "; ".join(extra.problems)


def _targets(found: Iterable[Readiness]) -> Iterator[tuple[str, str]]:
    """Recipes of a target that need the same stand together, each need in a line of its own."""
    for (target, to_run, to_build), rows in groupby(found, key=lambda row: (row.target, row.to_run, row.to_build)):
        verdict = f"{'does not run' if to_run else 'runs'} here, {'is not built' if to_build else 'builds'} here"
        yield f"{target:<12}  {', '.join(row.recipe for row in rows)}", verdict
        for need in dict.fromkeys((*to_run, *to_build)):
            words = [word for word, needs in (("run", to_run), ("build", to_build)) if need in needs]
            yield "", f"to {' and '.join(words)}: {need}"
