"""A rank of a tiny model: ``python -m gpu_check.rank_process BUNDLE DEVICE``, where the environment says which one.

Rank 0 prints what it found, as JSON; the other one serves it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from .tiny_herds import differences

_MEMORY = 4 << 30
"""Of the GPU that both ranks share, for each of them: by itself every rank would take nine tenths."""
_PATIENCE = 20.0
"""Seconds until ranks that wait for each other end; the step has a few more."""


def main() -> None:
    """See the module."""
    bundle, device = sys.argv[1:]
    options: dict[str, Any] = {"threads": 1, "timeout": _PATIENCE}
    if device == "cuda":
        options["gpu_memory"] = _MEMORY
    print(json.dumps(list(differences(Path(bundle), **options))), flush=True)


if __name__ == "__main__":
    main()
