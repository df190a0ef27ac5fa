"""Atomic files and directories: complete or absent, also after a kill."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from herdgraph import files
from herdgraph.errors import HerdError
from herdgraph.files import atomic_directory, atomic_file, free_bytes, require_room, sha256_of


def _names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_atomic_directory_appears_complete(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "out") as directory:
        (directory / "file").write_text("x")
        assert not (tmp_path / "out").exists()
    assert _names(tmp_path) == ["out"]
    assert _names(tmp_path / "out") == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_atomic_directory_error_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    def write() -> None:
        with atomic_directory(tmp_path / "out") as directory:
            (directory / "file").write_text("x")
            raise error

    with pytest.raises(error):
        write()
    assert _names(tmp_path) == []


def test_atomic_directory_overwrite(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text("x")
    with pytest.raises(HerdError, match="exists already"), atomic_directory(tmp_path / "out"):
        pass
    with pytest.raises(ValueError, match="boom"), atomic_directory(tmp_path / "out", overwrite=True):
        raise ValueError("boom")
    assert _names(tmp_path / "out") == ["manifest.json"], "a failed overwrite keeps the old content"
    with atomic_directory(tmp_path / "out", overwrite=True) as directory:
        (directory / "new").write_text("x")
    assert _names(tmp_path / "out") == ["new"]
    assert _names(tmp_path) == ["out"]


def test_check_output_refusals(tmp_path: Path) -> None:
    """Overwriting destroys nothing but what is written here."""
    (tmp_path / "home" / "input").mkdir(parents=True)
    (tmp_path / "home" / "input" / "manifest.json").write_text("x")
    (tmp_path / "home" / "letters").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "home" / "input")
    inputs = [tmp_path / "home" / "input"]
    for target in ("home", "home/input", "home/input/below", "home/../home/input", "link"):
        with pytest.raises(HerdError, match="overlaps the input"), \
                atomic_directory(tmp_path / target, overwrite=True, inputs=inputs):
            pass
    with pytest.raises(HerdError, match=r"home has no manifest\.json"), \
            atomic_directory(tmp_path / "home", overwrite=True):
        pass
    for target, which in ((Path(), "current"), (Path("/"), "root")):
        with pytest.raises(HerdError, match=f"the output is the {which} directory"), atomic_directory(target):
            pass
    assert _names(tmp_path / "home") == ["input", "letters"]


def test_atomic_directory_behind_link(tmp_path: Path) -> None:
    """The link stays, and what it leads to is replaced."""
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "manifest.json").write_text("x")
    (tmp_path / "link").symlink_to("real")
    with atomic_directory(tmp_path / "link", overwrite=True) as directory:
        (directory / "new").write_text("x")
    assert (tmp_path / "link").is_symlink()
    assert _names(tmp_path / "real") == ["new"]


def test_require_room(tmp_path: Path) -> None:
    require_room(tmp_path / "none" / "out", 1000, "the bundle")
    with pytest.raises(HerdError, match=r"the bundle needs 1000000\.0 TB, .*none has .*B free: choose another output"):
        require_room(tmp_path / "none" / "out", 10**18, "the bundle")
    assert free_bytes(Path("/proc/out")) is None


def test_atomic_directory_refusals(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(HerdError, match="is a file"), atomic_directory(tmp_path / "file", overwrite=True):
        pass
    with pytest.raises(HerdError, match="cannot write to"), atomic_directory(tmp_path / "file" / "below"):
        pass
    with pytest.raises(HerdError, match="cannot write to"), atomic_directory(Path("/proc/nothing/out")):
        pass


def test_atomic_directory_full_disk(tmp_path: Path) -> None:
    with pytest.raises(HerdError, match="No space left on device; nothing was left behind"), \
            atomic_directory(tmp_path / "out"):
        raise OSError(28, "No space left on device")
    assert _names(tmp_path) == []


def test_atomic_file_appears_complete(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("old")
    with atomic_file(tmp_path / "out") as path:
        path.write_text("new")
        assert (tmp_path / "out").read_text() == "old"
    assert (tmp_path / "out").read_text() == "new"
    assert _names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_atomic_file_error_keeps_old(error: BaseException, tmp_path: Path) -> None:
    def write() -> None:
        with atomic_file(tmp_path / "out") as path:
            path.write_text("half")
            raise error

    (tmp_path / "out").write_text("old")
    with pytest.raises(type(error)):
        write()
    assert (tmp_path / "out").read_text() == "old"
    assert _names(tmp_path) == ["out"]


def test_atomic_file_removes_abandoned(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    (tmp_path / f".out.{process.pid}.partial").write_text("half")
    (tmp_path / ".out.1.partial").write_text("half")  # process 1 always runs
    with atomic_file(tmp_path / "out") as path:
        path.write_text("x")
    assert _names(tmp_path) == [".out.1.partial", "out"]


KILLED = """
import sys, time
from pathlib import Path
from herdgraph.files import atomic_directory
with atomic_directory(Path(sys.argv[1])) as directory:
    (directory / "file").write_text("x")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_atomic_directory_removes_abandoned(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.kill()
    process.wait()
    time.sleep(0.05)
    assert not (tmp_path / "out").exists()
    assert len(_names(tmp_path)) == 1
    with atomic_directory(tmp_path / "out") as directory:
        (directory / "file").write_text("y")
    assert _names(tmp_path) == ["out"]


def _appear(path: Path) -> None:
    path.mkdir(exist_ok=True)
    (path / "thesis").write_text("precious")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(("appear", "problem"), [(_appear, "exists|has no manifest"), (Path.touch, "is a file")])
def test_atomic_directory_spares_what_appears_meanwhile(appear, problem: str, overwrite: bool, tmp_path: Path) -> None:
    with pytest.raises(HerdError, match=problem), atomic_directory(tmp_path / "out", overwrite=overwrite):
        appear(tmp_path / "out")
    assert _names(tmp_path) == ["out"]
    assert (tmp_path / "out").is_file() or _names(tmp_path / "out") == ["thesis"]


def test_rename_replaces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even what appears after the last look is safe."""
    monkeypatch.setattr(files, "check_output", lambda *_, **__: None)
    with pytest.raises(HerdError, match="not empty"), atomic_directory(tmp_path / "out"):
        _appear(tmp_path / "out")
    assert _names(tmp_path / "out") == ["thesis"]


def test_atomic_directory_has_one_writer(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "out"):
        for overwrite in (False, True):
            with pytest.raises(HerdError, match="another process is writing"), \
                    atomic_directory(tmp_path / "out", overwrite=overwrite):
                pass
        with atomic_directory(tmp_path / "other"):
            pass
    assert _names(tmp_path) == ["other", "out"]


def test_atomic_directory_heals_a_kill_between_two_renames(tmp_path: Path) -> None:
    """The old directory comes back, and is replaced only by who asks for it."""
    for name in ("out", ".out.x.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(name)
    with atomic_directory(tmp_path / "out", overwrite=True) as directory:  # killed after them: only remains are removed
        (directory / "manifest.json").write_text("new")
    assert _names(tmp_path) == ["out"]
    (tmp_path / "out").rename(tmp_path / ".out.x.old")
    with pytest.raises(HerdError, match="exists already"), atomic_directory(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "manifest.json").read_text() == "new"
    assert _names(tmp_path) == ["out"]


def test_sha256_of(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    assert sha256_of(tmp_path / "empty").startswith("e3b0c44298fc1c14")
