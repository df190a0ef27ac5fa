"""One rank of ``test_training_ranks.py``, started by torchrun: trains, prints its losses as rank 0."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from herdgraph.model.training.data import Batch
from herdgraph.model.training.parallel import Ranks
from herdgraph.model.training.trainer import Trainer, TrainOptions
from small_runs import OPTIMIZER, Fixture, model


class Dealt(Fixture):
    """Every rank's share of the batches that one process would accumulate."""

    def __init__(self, rank: int, world: int) -> None:
        super().__init__()
        self.rank, self.world = rank, world

    def __iter__(self):
        batches = super().__iter__()
        while True:
            dealt: list[Batch] = [next(batches) for _ in range(self.world)]
            yield dealt[self.rank]


def main() -> None:
    """Arguments: directory or -, steps, step after which rank 1 kills itself or 0."""
    directory = None if sys.argv[1] == "-" else Path(sys.argv[1])
    ranks = Ranks.from_environment()
    trained = model()
    ranks.shard(trained)
    loader = Dealt(ranks.rank, ranks.count)
    options = TrainOptions(steps=int(sys.argv[2]), save_every=2, accumulate=2 // ranks.count)
    trainer = Trainer(trained, loader, options, OPTIMIZER, directory=directory, ranks=ranks)

    def on_step(progress, _record) -> None:
        if progress.step == int(sys.argv[3]) and ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer.on_step = on_step
    losses = trainer.fit().losses
    if ranks.first:
        print(json.dumps(losses), flush=True)
    ranks.close()


if __name__ == "__main__":
    main()
