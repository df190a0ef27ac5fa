"""Pack ``gpu_check`` for a machine with a GPU and without a network, in parts that are small enough to be sent.

    python tools/pack_gpu_check.py OUTPUT [--python 3.12] [--sm 90] [--wheel FILE] [--part-mib 60] [--with PACKAGE]...

The machine has Python, numpy, onnx and CUDA 13's libraries as pip packages (which PyTorch brings). The rest goes along:
herdgraph, tiny bundles, and onnxruntime-gpu, of whose CUDA provider only the code for one architecture is kept. There:

    cat gpu-check.tar.xz.* > all.tar.xz && python3 -m tarfile -e all.tar.xz gpu-check && sh gpu-check/run.sh
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import fatbin
from gpu_check.artifacts import make_artifacts, remove_references

ROOT = Path(__file__).parents[1]
ONNXRUNTIME = "onnxruntime-gpu>=1.31,<1.33"
PACKAGE = ("model", "export", "runtimes", "calibration", "cli")
NEEDLESS = ("onnxruntime/tools/", "onnxruntime/transformers/", "onnxruntime/quantization/", "onnxruntime/datasets/",
            "libonnxruntime_providers_tensorrt.so", "capi/libonnxruntime.so")
"""Of onnxruntime-gpu's wheel: what no session needs."""
PROVIDER = "libonnxruntime_providers_cuda.so"
RUN = """#!/bin/sh
# Results go to $OUT, or to the folder results beside this file.
here=$(cd "$(dirname "$0")" && pwd)
PYTHONPATH="$here/site${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONPATH
exec "${PYTHON:-python3}" "$here/tools/gpu_check.py" --artifacts "$here/artifacts" --output "${OUT:-$here/results}" "$@"
"""


def main() -> None:
    """Gather, prune, compress, split."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--python", default="3.12", help="version on the other machine")
    parser.add_argument("--sm", type=int, action="append", help="architecture to keep; 90 unless given")
    parser.add_argument("--wheel", type=Path, help="of onnxruntime-gpu; otherwise it is downloaded")
    parser.add_argument("--part-mib", type=int, default=60)
    parser.add_argument("--with", dest="packages", action="append", default=["msgspec>=0.19,<1"],
                        help="packages that the other machine lacks")
    wanted = parser.parse_args()
    wanted.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=wanted.output) as directory:
        folder = Path(directory, "gpu-check")
        gather(folder)
        wheels = Path(directory, "wheels")
        wheel = wanted.wheel or download(ONNXRUNTIME, wanted.python, wheels)
        unpack(wheel, folder / "site")
        for package in wanted.packages:
            unpack(download(package, wanted.python, wheels), folder / "site")
        prune(folder / "site", wanted.sm or [90])
        parts = split(compress(folder, wanted.output / "gpu-check.tar.xz"), wanted.part_mib << 20)
    for part in parts:
        print(f"{part}  {part.stat().st_size / 2**20:.1f} MiB")


def gather(folder: Path) -> None:
    """Our own files: the package under its name, the tools, what is made before."""
    package = folder / "site" / "herdgraph"
    ignored = shutil.ignore_patterns("__pycache__", ".*")
    for name in PACKAGE:
        shutil.copytree(ROOT / name, package / name, ignore=ignored)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, package)
    shutil.copytree(ROOT / "tools" / "gpu_check", folder / "tools" / "gpu_check", ignore=ignored)
    shutil.copy(ROOT / "tools" / "gpu_check.py", folder / "tools")
    make_artifacts(folder / "artifacts")
    remove_references(folder / "artifacts")
    (folder / "run.sh").write_text(RUN)


def download(requirement: str, python: str, folder: Path) -> Path:
    """The wheel of a package for another version of Python, on Linux."""
    into = folder / requirement.split(">", maxsplit=1)[0]
    platforms = [word for version in ("2_28", "2_27", "2_17") for word in ("--platform", f"manylinux_{version}_x86_64")]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", python, "--implementation", "cp", *platforms]
    subprocess.run([*command, "-d", into, requirement], check=True)
    (wheel,) = into.glob("*.whl")
    return wheel


def unpack(wheel: Path, site: Path) -> None:
    """A wheel's files, but for those of onnxruntime that nothing here uses."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not any(part in name for part in NEEDLESS)]
        archive.extractall(site, names)


def prune(site: Path, architectures: list[int]) -> None:
    """Keep the GPU code of some architectures."""
    provider = site / "onnxruntime" / "capi" / PROVIDER
    data = bytearray(provider.read_bytes())
    fatbin.keep(data, architectures)
    left = fatbin.contents(data)
    if {sm for _, sm in left} != set(architectures):
        raise SystemExit(f"{provider.name} has code for {sorted({sm for _, sm in left})}, {architectures} was wanted")
    provider.write_bytes(data)


def compress(folder: Path, archive: Path) -> Path:
    """One archive of a folder's content, every file with the same date: the same input gives the same bytes."""

    def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.mtime = info.uid = info.gid = 0
        info.uname = info.gname = ""
        return info

    with tarfile.open(archive, "w:xz", preset=6) as file:
        for path in sorted(folder.iterdir()):
            file.add(path, path.name, filter=plain)
    return archive


def split(archive: Path, most: int) -> list[Path]:
    """Parts of an archive, which is removed."""
    for old in archive.parent.glob(f"{archive.name}.*"):
        old.unlink()
    parts = []
    with archive.open("rb") as file:
        while data := file.read(most):
            parts.append(archive.with_name(f"{archive.name}.{len(parts) + 1}"))
            parts[-1].write_bytes(data)
    archive.unlink()
    return parts


if __name__ == "__main__":
    main()
