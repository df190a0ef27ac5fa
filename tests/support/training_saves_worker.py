"""A run whose disk is full, or which is killed, while it saves (``test_checkpoints.py``); prints losses."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

from herdgraph.errors import HerdError
from herdgraph.model.training import checkpoint
from herdgraph.model.training.parallel.ranks import Ranks
from herdgraph.model.training.parallel.sharding import shard
from herdgraph.model.training.state import TrainProgress
from herdgraph.model.training.train_options import TrainOptions
from herdgraph.model.training.trainer import Trainer
from support.small_runs import OPTIMIZER, Fixture, model

ROOM = 100_000


def train(directory: Path, event: str, ranks: Ranks) -> list[float]:
    """Losses of a run, which ends ``full`` or ``killed`` after step 3 on the last rank, or goes on with ``-``."""
    trained = model()
    if ranks.mesh is not None:
        shard(trained, ranks)
    run = Trainer(trained, Fixture(), TrainOptions(steps=6, save_every=2), OPTIMIZER, directory=directory, ranks=ranks)

    def killed(*_: Any, **_named: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def on_step(progress: TrainProgress, _record: dict[str, float]) -> None:
        if progress.step != 3 or ranks.rank != ranks.count - 1:
            return
        run.store.wait()
        if event == "full":  # no file may grow beyond: as real an error of the system as that of a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, resource.RLIM_INFINITY))
        if event == "killed":
            checkpoint._Writer.finish = killed  # all is written, and nothing is complete yet

    run.on_step = on_step
    return run.fit().losses


def main() -> None:
    """Arguments: directory and event."""
    ranks = Ranks.from_environment()
    try:
        print(json.dumps(train(Path(sys.argv[1]), sys.argv[2], ranks)), flush=True)
    except HerdError as error:
        print(f"rank {ranks.rank}: {error}", flush=True)
        raise SystemExit(1) from error
    ranks.close()


if __name__ == "__main__":
    main()
