"""``herdgraph train`` on ranks that have imported what it needs before they were forked (``test_ranks.py``)."""

from __future__ import annotations

from herdgraph.cli import main as herdgraph
from herdgraph.model import data, processing
from herdgraph.model.training import runs

IMPORTED = (data, processing, runs)


def main() -> None:
    """Arguments: as of the command."""
    herdgraph(prog_name="herdgraph")
