"""Files that are either complete or absent: temporary names, one rename, content hashes."""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import HerdError

_BLOCK = 1 << 22


@contextmanager
def atomic_directory(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of ``target`` that becomes ``target`` when the block ends without an error.

    On any error, an interrupt included, the temporary directory is removed and ``target`` is left as it was. What a
    killed process left beside the same target is removed first; its name holds the process id.

    Raises:
        HerdError: ``target`` exists and ``overwrite`` is false, or its parent cannot be written.
    """
    target = Path(target).absolute()
    if target.exists() and not overwrite:
        raise HerdError(f"{target} exists already: choose another output or pass --overwrite")
    if target.exists() and not target.is_dir():
        raise HerdError(f"{target} is a file, a directory is written here: choose another output")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        prefix = f".{target.name}.{os.getpid()}."
        temporary = Path(tempfile.mkdtemp(prefix=prefix, suffix=".partial", dir=target.parent))
    except OSError as error:
        raise HerdError(f"cannot write to {target.parent}: {error.strerror}; choose another output") from error
    try:
        yield temporary
        temporary.chmod(0o755)
        _replace_directory(temporary, target)
    except OSError as error:
        raise HerdError(f"writing {target} failed: {error.strerror or error}; nothing was left behind") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_abandoned(target: Path) -> None:
    for path in target.parent.glob(f".{glob.escape(target.name)}.*.partial"):
        process = path.name.removeprefix(f".{target.name}.").split(".")[0]
        if process.isdigit() and not _is_running(int(process)):
            shutil.rmtree(path, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _replace_directory(new: Path, target: Path) -> None:
    if not target.exists():
        new.rename(target)
        return
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    target.rename(old)
    try:
        new.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old)


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
