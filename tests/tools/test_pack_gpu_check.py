"""The pack for machines without network: what is left out of the wheel, the GPU code that stays, and the parts."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

import fatbin
import pack_gpu_check
import pytest

from support.gpu_code import CODE, library

PROVIDER = f"onnxruntime/capi/{pack_gpu_check.PROVIDER}"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    wheel = tmp_path / "onnxruntime_gpu-1.31.1-cp312-cp312-manylinux_2_28_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("onnxruntime/__init__.py", "onnxruntime/transformers/fusion.py", "onnxruntime/tools/check.py",
                     "onnxruntime/capi/libonnxruntime.so.1.31.1", "onnxruntime/capi/libonnxruntime_providers_shared.so",
                     "onnxruntime/capi/libonnxruntime_providers_tensorrt.so"):
            archive.writestr(name, "")
        archive.writestr(PROVIDER, bytes(library(CODE)))
    pack_gpu_check.unpack(wheel, tmp_path / "site")
    return tmp_path / "site"


def test_what_no_session_needs_is_left_out(site: Path) -> None:
    names = {str(path.relative_to(site)) for path in site.rglob("*") if path.is_file()}
    assert names == {"onnxruntime/__init__.py", "onnxruntime/capi/libonnxruntime_providers_shared.so", PROVIDER}


def test_code_for_one_architecture_stays(site: Path) -> None:
    pack_gpu_check.prune(site, [90])
    assert fatbin.contents((site / PROVIDER).read_bytes()) == {("SM", 90): (2, 200)}


def test_an_architecture_that_is_not_there_is_refused(site: Path) -> None:
    with pytest.raises(SystemExit, match=r"has code for \[90\], \[90, 100\] was wanted"):
        pack_gpu_check.prune(site, [90, 100])


def test_parts_join_to_the_archive(tmp_path: Path) -> None:
    folder = tmp_path / "gpu-check"
    (folder / "site").mkdir(parents=True)
    (folder / "site" / "noise").write_bytes(bytes(range(256)) * 40)
    (folder / "run.sh").write_text(pack_gpu_check.RUN)
    (tmp_path / "gpu-check.tar.xz.9").write_text("of an earlier run")
    parts = pack_gpu_check.split(pack_gpu_check.compress(folder, tmp_path / "gpu-check.tar.xz"), 300)
    assert len(parts) > 1
    assert sorted(path.name for path in tmp_path.glob("*.xz*")) == [part.name for part in parts]
    joined = tmp_path / "all.tar.xz"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    with tarfile.open(joined) as archive:
        archive.extractall(tmp_path / "there", filter="data")
    assert (tmp_path / "there" / "site" / "noise").read_bytes() == bytes(range(256)) * 40
    assert (tmp_path / "there" / "run.sh").read_text() == pack_gpu_check.RUN
