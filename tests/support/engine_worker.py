"""One rank of a sharded engine that exchanges through gloo (``test_sharded_engine.py``): argument, the bundle."""

from __future__ import annotations

import sys

import torch.distributed

from herdgraph.runtimes import Engine
from herdgraph.runtimes.distributed import launch

IMPORTED = torch.distributed
"""By the parent, for all ranks."""


def main() -> None:
    """As if the ranks were on several machines, which share no memory."""
    launch.supported = lambda: False
    with Engine.load(sys.argv[1], threads=1, timeout=20) as engine:
        transport = type(engine._decoder.link).__name__  # type: ignore[union-attr]
        print(transport, engine.generate("Once upon", max_new_tokens=8).token_ids, flush=True)
