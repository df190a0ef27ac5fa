"""Runs an engine on the hollow device; started with the Python that has onnxruntime-gpu.

``engine_worker.py SCRIPT``: SCRIPT is Python code that finds ``mark`` (writes a mark to the device's log), ``Engine``,
and whatever else it imports, and prints what it found. ``site/sitecustomize.py`` has loaded the device.
"""

import ctypes
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """See the module."""
    from herdgraph.runtimes import Engine

    runtime = ctypes.CDLL("libcudart.so.13")

    def mark(name: str) -> None:
        runtime.hollow_mark(name.encode())

    names: dict[str, Any] = {"Engine": Engine, "mark": mark}
    exec(compile(Path(sys.argv[1]).read_text(), sys.argv[1], "exec"), names)


if __name__ == "__main__":
    main()
