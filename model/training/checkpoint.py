"""Training checkpoints: everything that the next step depends on, complete or absent.

``torch.distributed.checkpoint`` writes each rank's shards, so a run may continue on another number of ranks. A
checkpoint is written under a temporary name and renamed when all ranks are done; the newest complete one counts.

==============  ==================================================================
file            content
==============  ==================================================================
``model``       parameters, buffers, optimiser state, averaged weights (DCP)
``run.json``    steps, losses, where the loader stands, random state
==============  ==================================================================
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from ...errors import HerdError
from ...files import read_json

if TYPE_CHECKING:
    from .trainer import Trainer

logger = logging.getLogger(__name__)

KEEP = 2
"""Complete checkpoints that are kept."""


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        directory: holds one directory per checkpoint.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def newest(self) -> Path | None:
        """The newest complete checkpoint."""
        found = sorted(self.directory.glob("step-*/run.json"))
        return found[-1].parent if found else None

    def save(self, trainer: Trainer) -> Path:
        """Write a checkpoint.

        Raises:
            HerdError: it cannot be written; the ones before are untouched.
        """
        target = self.directory / f"step-{trainer.progress.step:08d}"
        temporary = target.with_suffix(".partial")
        try:
            if trainer.ranks.first:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
            trainer.ranks.sum(0)  # all wait for the directory
            with quiet():
                alone = trainer.ranks.mesh is None
                state_dict_saver.save(_state(trainer), checkpoint_id=temporary / "model", no_dist=alone)
            run = _run(trainer)
            if trainer.ranks.first:
                (temporary / "run.json").write_text(json.dumps(run), encoding="utf-8")
                temporary.replace(target)
                self._drop_old()
        except (OSError, RuntimeError, CheckpointException) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            before = self.newest()
            kept = f"the last one is {before}" if before else "there is none before it"
            raise HerdError(f"checkpoint {target} cannot be written ({_reason(error)}); {kept}; make room and start "
                            "again") from error
        return target

    def restore(self, trainer: Trainer) -> bool:
        """Continue from the newest checkpoint, if there is one.

        Raises:
            HerdError: it is damaged, or another model's.
        """
        found = self.newest()
        if found is None:
            return False
        state = _state(trainer)
        try:
            reader = FileSystemReader(found / "model")
            _require_parameters(found, state["model"], reader)
            # A part that no data has reached yet, such as an image tower, has no optimiser state.
            planner = DefaultLoadPlanner(allow_partial_load=True)
            with quiet():
                state_dict_loader.load(state, storage_reader=reader, planner=planner,
                                       no_dist=trainer.ranks.mesh is None)
        except (CheckpointException, RuntimeError, OSError) as error:
            raise HerdError(f"checkpoint {found} cannot be read ({_reason(error)}): remove it to continue from the one "
                            "before") from error
        set_state_dict(trainer.model, trainer.optimizer, model_state_dict=state["model"],
                       optim_state_dict=state["optimizer"])
        if trainer.average is not None:
            trainer.average.load_state_dict(state["average"])
        run = read_json(found / "run.json")
        trainer.progress.step, trainer.progress.tokens = run["progress"]["step"], run["progress"]["tokens"]
        trainer.progress.losses = run["progress"]["losses"]
        trainer.progress.held_out = {int(step): loss for step, loss in run["progress"]["held_out"].items()}
        trainer.loader.load_state_dict(run["loaders"])
        trainer.objective.load_state_dict(run["objective"])
        torch.set_rng_state(torch.tensor(run["random"], dtype=torch.uint8))
        logger.info("continuing from %s", found)
        return True

    def finish(self, trainer: Trainer) -> None:
        """Write the last checkpoint, unless it is there; all ranks must decide alike."""
        there = (self.directory / f"step-{trainer.progress.step:08d}").exists()
        if not all(trainer.ranks.gather(there)):
            self.save(trainer)

    def _drop_old(self) -> None:
        for old in sorted(path.parent for path in self.directory.glob("step-*/run.json"))[:-KEEP]:
            shutil.rmtree(old, ignore_errors=True)


def _run(trainer: Trainer) -> dict[str, Any]:
    """What else the next step depends on, as JSON; every rank has to call it."""
    return {
        "progress": asdict(trainer.progress), "objective": trainer.objective.state_dict(),
        "loaders": trainer.ranks.gather(trainer.loader.state_dict()), "random": torch.get_rng_state().tolist(),
    }


def _require_parameters(path: Path, wanted: dict[str, Any], reader: FileSystemReader) -> None:
    stored = reader.read_metadata().state_dict_metadata
    missing = [name for name in wanted if f"model.{name}" not in stored]
    if missing:
        raise HerdError(f"checkpoint {path} has no {missing[0]} and {len(missing) - 1} more: it is another model's, "
                        "give another output")


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warning that a process is alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _state(trainer: Trainer) -> dict[str, Any]:
    model, optimizer = get_state_dict(trainer.model, trainer.optimizer)
    state = {"model": model, "optimizer": optimizer}
    return state | ({"average": trainer.average.state_dict()} if trainer.average is not None else {})


def _reason(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1][:200]
