"""Installed packages, read from their metadata: nothing is imported, so a broken package ends nobody."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

_PROJECT = Path(__file__).parents[2] / "pyproject.toml"
_REQUIREMENT = re.compile(r"([\w.-]+)(?:\[[\w,-]+\])?\s*([^;]*)")
_EXTRA = re.compile(r"""extra == ["']([\w-]+)["']""")


@dataclass(frozen=True)
class Requirement:
    """A package that an extra brings.

    Attributes:
        package: its name on the index.
        bounds: versions that are allowed, for example ``>=1.24.1,<2``.
    """

    package: str
    bounds: str

    @property
    def problem(self) -> str | None:
        """Why it is not met, None when it is."""
        found = version_of(self.package)
        if found is None:
            return f"{self.package} is not installed"
        return None if allows(self.bounds, found) else f"{self.package} {found} is installed, {self.bounds} is needed"


@dataclass(frozen=True)
class Extra:
    """An extra of ``pip install 'herdgraph[NAME]'``.

    Attributes:
        name: as above.
        installed: version by package.
        problems: one for every package that is missing or has a version outside of its range.
    """

    name: str
    installed: dict[str, str]
    problems: tuple[str, ...]

    @property
    def cure(self) -> str:
        """The command that completes it."""
        return f"pip install 'herdgraph[{self.name}]'"


def version_of(package: str) -> str | None:
    """The installed version of a package, None when it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def importable(module: str) -> bool:
    """Whether a top-level module is there; it is not imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def extras() -> dict[str, Extra]:
    """The extras of this herdgraph by name; empty when neither a checkout nor an installation tells."""
    by_extra: dict[str, list[Requirement]] = {}
    for name, text in _requirements():
        if match := _REQUIREMENT.match(text):
            by_extra.setdefault(name, []).append(Requirement(match[1], match[2].strip()))
    return {name: _extra(name, requirements) for name, requirements in by_extra.items()}


def _extra(name: str, requirements: Iterable[Requirement]) -> Extra:
    found = {each.package: version for each in requirements if (version := version_of(each.package))}
    return Extra(name, found, tuple(problem for each in requirements if (problem := each.problem)))


def _requirements() -> Iterator[tuple[str, str]]:
    """Extra and requirement: of the checkout that this file lies in, which its installation may be older than."""
    if _PROJECT.exists():
        with _PROJECT.open("rb") as file:
            declared: dict[str, list[str]] = tomllib.load(file)["project"]["optional-dependencies"]
        yield from ((name, text) for name, texts in declared.items() for text in texts)
        return
    try:
        lines = importlib.metadata.requires("herdgraph") or []
    except importlib.metadata.PackageNotFoundError:
        return
    yield from ((match[1], line) for line in lines if (match := _EXTRA.search(line)))


def allows(bounds: str, version: str) -> bool:
    """Whether bounds such as ``>=1.24.1,<2`` or ``==2.13.*`` allow a version; what pip has more of is let through."""
    return all(_allows(bound.strip(), version) for bound in bounds.split(",") if bound.strip())


def _allows(bound: str, version: str) -> bool:
    operator, wanted = re.match(r"[<>=!~]*", bound)[0], bound.lstrip("<>=!~ ")  # type: ignore[index]
    sign = _compare(release(version), release(wanted))
    if operator == "==" and wanted.endswith(".*"):
        return release(version)[: len(release(wanted))] == release(wanted)
    return {"==": sign == 0, ">=": sign >= 0, "<=": sign <= 0, "<": sign < 0, ">": sign > 0, "!=": sign != 0}.get(
        operator, True)


def release(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with: 2.13.0 of ``2.13.0+cu130``."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


def _compare(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """-1, 0 or 1, with 1.2 equal to 1.2.0."""
    pairs = zip_longest(a, b, fillvalue=0)
    return next((1 if left > right else -1 for left, right in pairs if left != right), 0)
