"""Files that are either complete or absent: temporary names, one rename, content hashes."""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from .errors import HerdError

_BLOCK = 1 << 22


@contextmanager
def atomic_directory(
    target: Path, *, overwrite: bool = False, mark: str = "manifest.json", inputs: Iterable[Path] = ()
) -> Iterator[Path]:
    """Yield a temporary sibling of ``target`` that becomes ``target`` when the block ends without an error.

    On any error, an interrupt included, the temporary directory is removed and ``target`` is left as it was. What a
    killed process left beside the same target is healed first. Two processes never write to one target at a time, and
    what appears there meanwhile is never replaced, unless ``overwrite`` allows it.

    Args:
        target: directory to create.
        overwrite: replace an existing directory that holds ``mark``.
        mark: the file that tells what kind of directory this is.
        inputs: files and directories that are read meanwhile.

    Raises:
        HerdError: ``check_output`` refuses the target, its parent cannot be written, another process writes to it, or
            something appeared there.
    """
    check_output(target, overwrite=overwrite, mark=mark, inputs=inputs)
    link, target = Path(target), Path(os.path.realpath(target))  # a link stays, and what it leads to is replaced
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary, lock = _claim(target)
    except OSError as error:
        raise HerdError(f"cannot write to {target.parent}: {error.strerror}; choose another output") from error
    try:
        check_output(link, overwrite=overwrite, mark=mark)  # what a killed process had moved away may be back
        yield temporary
        temporary.chmod(0o755)
        check_output(link, overwrite=overwrite, mark=mark)
        _put_in_place(temporary, target, overwrite=overwrite)
    except OSError as error:
        raise HerdError(f"writing {target} failed: {error.strerror or error}; nothing was left behind") from error
    except BaseException as error:
        error.add_note(f"no incomplete {target.name} was left behind")  # shown when it was an interruption
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a temporary sibling of ``target`` that becomes ``target`` when the block ends without an error.

    The content is on the disk before the rename, so that a power cut leaves no empty file under the final name. On any
    error the temporary file is removed and ``target`` is left as it was; an ``OSError`` passes, for the caller knows
    what to advise. What a killed process left beside the same target is removed first.

    Args:
        target: file to create or to replace, in an existing directory.
    """
    for path in _siblings(target, "partial"):
        process = path.name.removeprefix(f".{target.name}.").split(".")[0]
        if process.isdigit() and not _is_running(int(process)):
            path.unlink(missing_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def check_output(target: Path, *, overwrite: bool, mark: str, inputs: Iterable[Path] = ()) -> None:
    """Refuse an output that would destroy something. Arguments as in ``atomic_directory``.

    Raises:
        HerdError: the target is the current or the root directory, is, holds or lies inside of an input, exists
            without ``overwrite``, or is not a directory with ``mark``.
    """
    target = Path(target)
    if target == Path() or not Path(os.path.realpath(target)).name:
        which = "root" if target.is_absolute() else "current"
        raise HerdError(f"the output is the {which} directory: give the name of a directory to create")
    for path in inputs:
        found, wanted = Path(os.path.realpath(path)), Path(os.path.realpath(target))
        if found.is_relative_to(wanted) or wanted.is_relative_to(found):
            raise HerdError(f"the output {target} overlaps the input {path}: choose another output")
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise HerdError(f"{target} is a file, a directory is written here: choose another output")
    if not overwrite:
        raise HerdError(f"{target} exists already: choose another output or pass --overwrite")
    if not (target / mark).is_file() and any(target.iterdir()):
        raise HerdError(f"{target} has no {mark}: it is not what is written here and would be lost; choose another "
                        "output or remove it yourself")


def require_room(target: Path, needed: int, what: str) -> None:
    """Check that what will be written to ``target`` fits.

    Args:
        target: need not exist.
        needed: bytes.
        what: is written, for the message.

    Raises:
        HerdError: it does not.
    """
    free = free_bytes(target)
    if free is not None and needed > free:
        raise HerdError(f"{what} needs {size(needed)}, {target.absolute().parent} has {size(free)} free: "
                        "choose another output or make room")


def free_bytes(target: Path) -> int | None:
    """Free space where ``target`` is or would be, None on file systems that have no size, such as /proc."""
    above = (target.absolute(), *target.absolute().parents)
    usage = shutil.disk_usage(next(path for path in above if path.exists()))
    return usage.free if usage.total else None


def size(count: float) -> str:
    """Bytes for people, decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _siblings(target: Path, kind: str) -> list[Path]:
    """Temporary files or directories of a target: ``partial`` are being written, ``old`` were moved out of the way."""
    return sorted(target.parent.glob(f".{glob.escape(target.name)}.*.{kind}"))


def _claim(target: Path) -> tuple[Path, int]:
    """A temporary directory for a target, and the lock that says so until its descriptor is closed.

    The lock of the parent directory is held for a moment, so that no other process looks in between.
    """
    parent = os.open(target.parent, os.O_RDONLY)
    try:
        _lock(parent, wait=True)
        _heal(target)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
        claimed = os.open(temporary, os.O_RDONLY)
        _lock(claimed, wait=False)
        return temporary, claimed
    finally:
        os.close(parent)


def _heal(target: Path) -> None:
    """Undo what a killed process left: remove what it was writing, put back what it had moved away.

    Raises:
        HerdError: a process is still at it.
    """
    for path in filter(Path.is_dir, _siblings(target, "partial")):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            if not _lock(descriptor, wait=False):
                raise HerdError(f"another process is writing {target}: wait for it or choose another output")
        finally:
            os.close(descriptor)
        shutil.rmtree(path, ignore_errors=True)
    for old in _siblings(target, "old"):
        if os.path.lexists(target):
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(target)


def _lock(descriptor: int, *, wait: bool) -> bool:
    """Lock an open file or directory until it is closed, also by the end of the process; False when it is locked.

    Where the system or the file system has no such locks, everything counts as free.
    """
    try:
        fcntl = import_module("fcntl")
    except ImportError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _put_in_place(new: Path, target: Path, *, overwrite: bool) -> None:
    """Rename a directory to its target. A rename never replaces a file or a directory that holds something.

    To overwrite takes two renames. A process that is killed between them leaves the old directory beside the target,
    where ``_heal`` finds it.
    """
    if not (overwrite and target.exists()):
        new.rename(target)
        return
    old = new.with_suffix(".old")
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
