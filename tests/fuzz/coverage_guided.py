"""Readers of bytes under atheris, which looks for inputs that reach new branches of them.

    python -m fuzz.coverage_guided READER [--seconds 300]     READER: safetensors, gguf, image, rows, tar, json

A refusal is a ``HerdError``; anything else ends the run with its traceback and the input in a file ``crash-…``.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["herdgraph"], enable_loader_override=False):
    from herdgraph.errors import HerdError
    from herdgraph.model.checkpoint.tensors.header import read_header
    from herdgraph.model.data import open_samples
    from herdgraph.model.processing.images import ImageProcessor
    from herdgraph.model.upcycle.gguf_source import open_gguf
    from herdgraph.reading import parse_json

_IMAGES = ImageProcessor(side=28)


def _samples(path: Path) -> None:
    samples = open_samples([path])
    for index in range(len(samples)):
        _ = samples[index]


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "safetensors": (".safetensors", read_header),
    "gguf": (".gguf", open_gguf),
    "image": (".png", _IMAGES.process),
    "rows": (".jsonl", _samples),
    "tar": (".tar", _samples),
    "json": (".json", lambda path: parse_json(path.read_bytes(), "it")),
}


def main() -> None:
    """Fuzz one reader for some time."""
    name, *rest = sys.argv[1:]
    seconds = rest[1] if rest[:1] == ["--seconds"] else "300"
    suffix, read = READERS[name]
    path = Path(tempfile.mkdtemp(prefix="herdgraph-atheris-")) / f"input{suffix}"

    def read_bytes(data: bytes) -> None:
        path.write_bytes(data)
        with contextlib.suppress(HerdError):
            read(path)

    atheris.Setup([sys.argv[0], f"-max_total_time={seconds}", "-max_len=4096", "-rss_limit_mb=4096"], read_bytes)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
