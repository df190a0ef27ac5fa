"""One rank of ``test_distill_ranks.py``, started by torchrun: distils, writes what its tokens weighed in every step."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from herdgraph.model.training.runs import DistilOptions, distil
from herdgraph.model.training.state import TrainProgress
from herdgraph.model.training.trainer import TrainOptions


def main() -> None:
    """Argument: directory with ``checkpoint`` and ``data.jsonl``."""
    directory = Path(sys.argv[1])
    options = DistilOptions(
        checkpoint=directory / "checkpoint", teacher=directory / "checkpoint", fresh=True, weighting="balance",
        data=(directory / "data.jsonl",), output=directory / "run", rows=1, seq_len=64, held_out=0,
        train=TrainOptions(steps=3, accumulate=2))
    seen: list[tuple[float, float]] = []

    def on_step(_progress: TrainProgress, record: dict[str, float]) -> None:
        seen.append((record["soft_weight"], record["hard"]))

    distil(options, on_step)
    (directory / f"rank{os.environ['RANK']}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
