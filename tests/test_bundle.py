"""The bundle format: what is refused, and how it says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from herdgraph.errors import HerdError
from herdgraph.model.presets import TINY
from herdgraph.runtimes.bundle import MANIFEST, Bundle, Manifest, describe_files, write_manifest


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    directory = tmp_path / "bundle"
    (directory / "processor").mkdir(parents=True)
    (directory / "decoder.onnx").write_bytes(b"graph")
    (directory / "decoder.data").write_bytes(bytes(range(256)) * 64)
    (directory / "processor" / "tokenizer.json").write_text("{}")
    graphs, files = {"decoder": "decoder.onnx"}, describe_files(directory)
    write_manifest(directory, Manifest(target="cpu", recipe="fp32", config=TINY, graphs=graphs,
                                       active_bytes=0, files=files))
    return directory


def _edit(bundle: Path, **changes: object) -> None:
    path = bundle / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_round_trip(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    assert opened.manifest.config == TINY
    assert opened.graph("decoder") == bundle / "decoder.onnx"
    assert set(opened.manifest.files) == {"decoder.onnx", "decoder.data", "processor/tokenizer.json"}
    assert opened.bytes == 5 + 256 * 64 + 2


def _flip(bundle: Path) -> None:
    data = bytearray((bundle / "decoder.data").read_bytes())
    data[5000] ^= 1
    (bundle / "decoder.data").write_bytes(bytes(data))


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "one byte altered": (_flip, r"decoder.data was altered: SHA-256 .* copy or rebuild"),
    "file cut": (lambda b: (b / "decoder.data").write_bytes(b"x"), r"has 1 bytes, the manifest says 16384"),
    "file missing": (lambda b: (b / "decoder.data").unlink(), r"decoder.data is missing"),
    "newer format": (lambda b: _edit(b, format=99), r"bundle format is 99, this herdgraph reads format 1: update"),
    "older format": (lambda b: _edit(b, format=0), r"format is 0, .*: rebuild"),
    "no format": (lambda b: _edit(b, format=None), r"format is None"),
    "path outside": (lambda b: _edit(b, graphs={"decoder": "../../etc/passwd"}), r"outside of the bundle: refused"),
    "absolute path": (lambda b: _edit(b, files={"/etc/passwd": {"bytes": 1, "sha256": ""}}), r"outside of the bundle"),
    "unhashed graph": (lambda b: _edit(b, graphs={"decoder": "other.onnx"}), r"has no hash for graph 'other.onnx'"),
    "not JSON": (lambda b: (b / MANIFEST).write_text("{"), r"cannot be read"),
    "missing key": (lambda b: (b / MANIFEST).write_text('{"format": 1}'), r"cannot be read \('files'\)"),
    "no manifest": (lambda b: (b / MANIFEST).unlink(), r"not a herdgraph bundle; build one with build.py"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(fault: str, bundle: Path) -> None:
    damage, message = FAULTS[fault]
    damage(bundle)
    with pytest.raises(HerdError, match=message) as caught:
        Bundle.open(bundle)
    assert "\n" not in str(caught.value)


def test_size_is_checked_even_without_hashes(bundle: Path) -> None:
    _flip(bundle)
    Bundle.open(bundle, verify=False)
    (bundle / "decoder.data").write_bytes(b"x")
    with pytest.raises(HerdError, match="has 1 bytes"):
        Bundle.open(bundle, verify=False)
