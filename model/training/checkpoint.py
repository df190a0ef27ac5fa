"""Training checkpoints: everything that the next step depends on, complete or absent.

``torch.distributed.checkpoint`` writes each rank's shards, so a run may continue on another number of ranks. A save
copies the state on the CPU and returns; a thread writes the copy while training goes on, under a temporary name that
is given up for the final one when all ranks have written theirs. The newest complete checkpoint counts.

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
import os
import shutil
import warnings
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.storage import WriteResult

from ...errors import HerdError
from ...reading import read_json
from .fp8.amax_history import share_histories
from .state import TrainState

logger = logging.getLogger(__name__)

KEEP = 2
"""Complete checkpoints that are kept."""
_PARTIAL = ".partial"


class CheckpointStore:
    """The checkpoints of one run. Use it as a context: leaving waits for the save under way.

    Args:
        directory: holds one directory per checkpoint.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._under_way: tuple[Path, Future[Any]] | None = None
        self._group: Any = None

    def newest(self) -> Path | None:
        """The newest complete checkpoint."""
        found = complete(self.directory)
        return found[-1] if found else None

    def save(self, state: TrainState) -> None:
        """Begin to write a checkpoint of the present state, after the one under way is complete.

        Raises:
            HerdError: the one under way could not be written, or there is no memory for a copy of the state.
        """
        self.wait()
        target = self.directory / f"step-{state.progress.step:08d}"
        alone = state.ranks.mesh is None
        if not alone and self._group is None:
            # Of its own, so that what the thread exchanges does not get between the collectives of training.
            self._group = dist.new_group(backend="gloo")
        _be_quiet()
        share_histories(state.model, state.ranks.maximum)
        try:
            writer = _Writer(target, json.dumps(_run(state)))
            future = state_dict_saver.async_save(_tensors(state), storage_writer=writer, process_group=self._group,
                                                 no_dist=alone)
        except (OSError, RuntimeError, CheckpointException) as error:
            raise self._unwritten(target, error) from error
        self._under_way = target, cast("Future[Any]", future)

    def wait(self) -> None:
        """Until the save under way, if there is one, is complete.

        Raises:
            HerdError: it could not be written; the ones before are untouched.
        """
        if self._under_way is None:
            return
        (target, future), self._under_way = self._under_way, None
        try:
            future.result()
        except (OSError, RuntimeError, CheckpointException) as error:
            raise self._unwritten(target, error) from error

    @property
    def has_failed(self) -> bool:
        """Whether the save under way is known to have failed; ``wait`` tells why."""
        if self._under_way is None:
            return False
        future = self._under_way[1]
        return future.done() and future.exception() is not None

    def restore(self, state: TrainState) -> Path | None:
        """Continue from the newest checkpoint, if there is one, and say which.

        Raises:
            HerdError: it is damaged, or another model's.
        """
        if state.ranks.first:
            self._clear()
        found = self.newest()
        if found is None:
            return None
        stored = _tensors(state)
        try:
            reader = FileSystemReader(found / "model")
            _require_parameters(found, stored["model"], reader)
            # A part that no data has reached yet, such as an image tower, has no optimiser state.
            planner = DefaultLoadPlanner(allow_partial_load=True)
            _be_quiet()
            state_dict_loader.load(stored, storage_reader=reader, planner=planner, no_dist=state.ranks.mesh is None)
        except (CheckpointException, RuntimeError, OSError) as error:
            raise HerdError(f"checkpoint {found} cannot be read ({_reason(error)}): remove it to continue from the one "
                            "before") from error
        set_state_dict(state.model, state.optimizer, model_state_dict=stored["model"],
                       optim_state_dict=stored["optimizer"])
        if state.average is not None:
            state.average.load_state_dict(stored["average"])
        run = read_json(found / "run.json")
        state.progress.step, state.progress.tokens = run["progress"]["step"], run["progress"]["tokens"]
        state.progress.losses = run["progress"]["losses"]
        state.progress.held_out = {int(step): loss for step, loss in run["progress"]["held_out"].items()}
        state.loader.load_state_dict(run["loaders"])
        torch.set_rng_state(torch.tensor(run["random"], dtype=torch.uint8))
        return found

    def finish(self, state: TrainState) -> None:
        """Write the last checkpoint, unless it is there, and wait for it; all ranks must decide alike.

        Raises:
            HerdError: it cannot be written, or the one under way could not.
        """
        self.wait()
        there = (self.directory / f"step-{state.progress.step:08d}").exists()
        if not all(state.ranks.gather(there)):
            self.save(state)
            self.wait()

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except HerdError as unwritten:
            if error is None:
                raise
            logger.warning("%s", unwritten)  # what ended the run is the greater news

    def _clear(self) -> None:
        """Remove what a save left that never became complete."""
        for left in self.directory.glob(f"*{_PARTIAL}"):
            shutil.rmtree(left, ignore_errors=True)

    def _unwritten(self, target: Path, error: BaseException) -> HerdError:
        self._clear()
        before = self.newest()
        kept = f"the last one is {before}" if before else "there is none before it"
        return HerdError(f"checkpoint {target} cannot be written ({_reason(error)}); {kept}; make room and start again")


class _Writer(FileSystemWriter):
    """Writes the shards of a rank; ``finish``, which the first rank calls when all have written, makes it complete.

    Args:
        target: final name.
        run: content of ``run.json``, as it was when the state was copied.
    """

    def __init__(self, target: Path, run: str) -> None:
        self._target, self._run = target, run
        self._partial = target.with_name(target.name + _PARTIAL)
        super().__init__(self._partial / "model")

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """See ``StorageWriter``; what is raised here reaches all ranks."""
        super().finish(metadata, results)
        with (self._partial / "run.json").open("w", encoding="utf-8") as file:
            file.write(self._run)
            file.flush()
            os.fsync(file.fileno())
        self._partial.replace(self._target)
        for old in complete(self._target.parent)[:-KEEP]:
            shutil.rmtree(old, ignore_errors=True)


def complete(directory: Path) -> list[Path]:
    """The complete checkpoints in a directory, oldest first."""
    found = (path.parent for path in directory.glob("step-*/run.json"))
    return sorted(path for path in found if path.suffix != _PARTIAL)


def _run(state: TrainState) -> dict[str, Any]:
    """What else the next step depends on, as JSON; every rank has to call it."""
    return {
        "progress": asdict(state.progress), "loaders": state.ranks.gather(state.loader.state_dict()),
        "random": torch.get_rng_state().tolist(),
    }


def _require_parameters(path: Path, wanted: dict[str, Any], reader: FileSystemReader) -> None:
    stored = reader.read_metadata().state_dict_metadata
    missing = [name for name in wanted if f"model.{name}" not in stored]
    if missing:
        raise HerdError(f"checkpoint {path} has no {missing[0]} and {len(missing) - 1} more: it is another model's, "
                        "give another output")


def _be_quiet() -> None:
    """No warning that a process is alone; for good, since the thread that saves would warn as well."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def _tensors(state: TrainState) -> dict[str, Any]:
    model, optimizer = get_state_dict(state.model, state.optimizer)
    tensors = {"model": model, "optimizer": optimizer}
    return tensors | ({"average": state.average.state_dict()} if state.average is not None else {})


def _reason(error: BaseException) -> str:
    """What the operating system said, where it said something, else the last line of the first failure."""
    if isinstance(error, CheckpointException):
        error, _ = next(iter(error.failures.values()))
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    text = (isinstance(cause, OSError) and cause.strerror) or str(error).strip() or type(error).__name__
    return text.splitlines()[-1][:200]
