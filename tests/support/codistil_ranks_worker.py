"""One rank of ``test_distill_ranks.py``, started by torchrun: a teacher that learns and a student, over ranks."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from herdgraph.model.training.runs import CodistilOptions, codistil
from herdgraph.model.training.train_options import TrainOptions


def main() -> None:
    """Argument: directory with ``checkpoint`` and ``data.jsonl``."""
    directory = Path(sys.argv[1])
    options = CodistilOptions(
        students=(directory / "checkpoint",), teacher=directory / "checkpoint", teacher_learns=True,
        data=(directory / "data.jsonl",), output=directory / "run", rows=1, seq_len=64, held_out=0,
        train=TrainOptions(steps=3, accumulate=2, log_every=1))
    losses = codistil(options).losses
    (directory / f"rank{os.environ['RANK']}.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main()
