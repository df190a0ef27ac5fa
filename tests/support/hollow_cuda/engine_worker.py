"""Runs an engine on the hollow device; started with the Python that has onnxruntime-gpu.

``engine_worker.py LIBRARIES SCRIPT``: SCRIPT is Python code that finds ``mark`` (writes a mark to the device's log),
``Engine``, and whatever else it imports, and prints what it found. Checks of the driver are left out: the hollow one
answers no questions.
"""

import sys
from pathlib import Path
from typing import Any

from worker import load_libraries


def main() -> None:
    """See the module."""
    runtime = load_libraries(Path(sys.argv[1]))
    from herdgraph.runtimes import Engine
    from herdgraph.runtimes.executors.ort.cuda import load

    load.require_gpu = lambda _place: None

    def mark(name: str) -> None:
        runtime.hollow_mark(name.encode())

    names: dict[str, Any] = {"Engine": Engine, "mark": mark}
    exec(compile(Path(sys.argv[2]).read_text(), sys.argv[2], "exec"), names)


if __name__ == "__main__":
    main()
