"""The training loop: batches in, steps, records, checkpoints.

One step is ``accumulate`` batches on every rank. The loss is a sum over labelled tokens, divided by their number over
all batches and ranks of the step, so that it does not depend on how they were cut up.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property, partial
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

from ...errors import HerdError
from ..llama4.model import Llama4
from .broken import bad_gradient, first_broken_output
from .checkpoint import CheckpointStore
from .data import Batch, Loader
from .fp8.autocast import recompute_contexts
from .metrics import RunLog, flops_per_token, measured_peak
from .moe.experts import auxiliary_loss, fade_selection_biases, update_selection_biases
from .objective import NextToken, Objective, held_out_loss, labelled
from .optim import (
    AveragedWeights,
    OptimizerOptions,
    clip_gradients,
    learning_rate_factor,
    optimizer_for,
    set_learning_rate,
)
from .parallel.ranks import Ranks
from .state import TrainProgress, TrainState
from .stopping import StopRequest
from .train_options import TrainOptions

logger = logging.getLogger(__name__)


class Trainer:
    """Trains a model.

    Args:
        model: prepared for training.
        loader: batches of this rank.
        options: of the run.
        optimizer: learning rate, its schedule, decay, clipping and averaging.
        objective: what is minimised.
        held_out: batches for the held-out loss.
        directory: for records and checkpoints; None keeps nothing.
        ranks: this process among others.
        autocast: makes prepared products FP8.
        on_step: called after each step, for a display.
    """

    def __init__(
        self, model: Llama4, loader: Loader, options: TrainOptions, optimizer: OptimizerOptions, *,
        objective: Objective | None = None, held_out: list[Batch] | None = None, directory: Path | None = None,
        ranks: Ranks | None = None, autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
        on_step: Callable[[TrainProgress, dict[str, float]], None] = lambda _progress, _record: None,
    ) -> None:
        self.options, self.schedule, self.held_out = options, optimizer, held_out or []
        self.autocast, self.on_step = autocast, on_step
        average = AveragedWeights(model, optimizer.ema) if optimizer.ema else None
        self.state = TrainState(model, optimizer_for(model, optimizer), average, loader, objective or NextToken(),
                                ranks or Ranks.alone())
        self.store = CheckpointStore(directory / "checkpoints") if directory else None
        self.directory = directory if self.state.ranks.first else None
        self._saved = time.monotonic()
        if options.recompute:
            recompute_layers(model)

    def fit(self) -> TrainProgress:
        """Train to the last step; continues a run whose directory holds a checkpoint.

        Raises:
            HerdError: the loss is not a number; names the step and the first layer that gave none.
        """
        fit_together([self])
        return self.state.progress

    @contextmanager
    def running(self) -> Iterator[None]:
        """Where steps may be made: from the newest checkpoint, with open records, and a last checkpoint at the end."""
        if self.store is not None and (found := self.store.restore(self.state)):
            self._tell_resumed(found)
        self._saved = time.monotonic()
        with RunLog(self.directory) as self._log, self.store or nullcontext():
            self._batches = iter(self.state.loader)
            self.state.model.train()
            yield
            self.finish()

    def _tell_resumed(self, found: Path) -> None:
        step, steps = self.state.progress.step, self.options.steps
        if step < steps:
            saved = time.strftime("%Y-%m-%d %H:%M", time.localtime((found / "run.json").stat().st_mtime))
            logger.info("resuming from step %d of %d, saved %s: weights, optimizer and place in the data are those of "
                        "%s", step, steps, saved, found)

    @property
    def left(self) -> int:
        """Steps to make."""
        return max(0, self.options.steps - self.state.progress.step)

    @property
    def is_late(self) -> bool:
        """Whether it is time for a checkpoint."""
        return 0 < self.options.save_minutes * 60 <= time.monotonic() - self._saved

    def save(self, *, late: bool) -> None:
        """Begin a checkpoint, if it is time or this step has one."""
        options, step = self.options, self.state.progress.step
        if self.store is not None and self.left and (late or (options.save_every and step % options.save_every == 0)):
            logger.info("saving step %d of %d in %s", step, options.steps, self.store.directory)
            self.store.save(self.state)
            self._saved = time.monotonic()

    def finish(self) -> None:
        """Write a checkpoint of this step, unless it is there, and wait for it."""
        if self.store is not None:
            self.store.finish(self.state)

    def step(self) -> None:
        """One step, recorded."""
        options, state = self.options, self.state
        batches = [next(self._batches) for _ in range(options.accumulate)]
        started, progress, ranks = time.perf_counter(), state.progress, state.ranks
        loss, record = self._step(batches)
        seconds = time.perf_counter() - started
        progress.losses.append(loss)
        step = progress.step
        shape = batches[0].input_ids_BT.shape
        rate = len(batches) * shape.numel() / seconds
        record |= {"loss": loss, "tokens_per_second": rate * ranks.data_ranks,
                   "mfu": rate * flops_per_token(state.model.config, shape[1]) / (self._peak * ranks.parallel.tensor)}
        last = step == options.steps
        if self.held_out and (last or (options.evaluate_every and step % options.evaluate_every == 0)):
            record["held_out"] = progress.held_out[step] = held_out_loss(state.model, self.held_out)
        if step % options.log_every == 0 or last:
            record |= {f"samples/{kind}": ranks.sum(state.loader.counts[kind]) for kind in ("cut", "skipped")}
            self._log.write(step, record)
        self.on_step(progress, record)

    def _step(self, batches: list[Batch]) -> tuple[float, dict[str, float]]:
        """One optimiser step; the mean loss per labelled token, and what is to be recorded."""
        state, ranks, progress = self.state, self.state.ranks, self.state.progress
        fade_selection_biases(state.model, progress.step, self.options.steps)
        tokens = max(1, int(ranks.sum(sum(labelled(batch) for batch in batches))))
        total = 0.0
        record: dict[str, float] = {}
        for batch in batches:
            with self._precision():
                loss, parts = state.objective(state.model, batch, progress.step)
            value = float(loss.detach())
            if not math.isfinite(ranks.sum(value)):  # all stop together, and look for the layer together
                raise HerdError(f"step {progress.step + 1}: the loss is {value}; {self._blame(batch)}; lower the "
                                "learning rate, or continue from the last checkpoint with other data")
            # Gradients are averaged over data ranks afterwards, hence the factor.
            whole = loss * (ranks.data_ranks / tokens)
            if (auxiliary := auxiliary_loss(state.model)) is not None:
                whole = whole + auxiliary / len(batches)
            whole.backward()
            total += value
            record |= parts
        factor = learning_rate_factor(progress.step, self.options.steps, self.schedule)
        rate = self.schedule.learning_rate * factor
        set_learning_rate(state.optimizer, rate)
        norm = clip_gradients(state.model.parameters(), self.schedule.clip)
        if not math.isfinite(norm):
            raise HerdError(f"step {progress.step + 1}: the gradient of {bad_gradient(state.model)} is not finite; "
                            "lower the learning rate, or continue from the last checkpoint with other data")
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        if state.average is not None:
            state.average.update(state.model)
        balance = self._balance()
        progress.step += 1
        progress.tokens += tokens
        return ranks.sum(total) / tokens, {**record, **balance, "gradient_norm": norm, "learning_rate": rate}

    @cached_property
    def _peak(self) -> float:
        return measured_peak(torch.float32 if self.options.precision == "fp32" else torch.bfloat16)

    def _precision(self) -> AbstractContextManager[object]:
        if self.options.precision == "fp32":
            return nullcontext()
        device = next(self.state.model.parameters()).device.type
        stack = ExitStack()
        stack.enter_context(torch.autocast(device, torch.bfloat16))
        if self.options.precision == "fp8":
            stack.enter_context(self.autocast())
        return stack

    def _blame(self, batch: Batch) -> str:
        """The first layer that gave no numbers, found by running the batch once more."""
        with torch.no_grad(), self._precision(), first_broken_output(self.state.model) as name:
            self.state.objective(self.state.model, batch, self.state.progress.step)
        return f"{name[0]} is the first to give values that are not finite" if name else "no single layer is to blame"

    def _balance(self) -> dict[str, float]:
        """Shift the routers' biases by the load of this step; how even it was, largest share of the mean, and which
        share of the tokens the biases moved.
        """
        found = {}
        for name, (counts_E, moved) in update_selection_biases(self.state.model, self.state.ranks.sum_tensor).items():
            found[f"load/{name}"] = float(counts_E.max() / counts_E.float().mean().clamp(min=1e-9))
            found[f"moved/{name}"] = moved
        return found


def fit_together(trainers: Sequence[Trainer]) -> None:
    """Train models side by side, a step of each in turn: what one computes for a batch, those behind it may use.

    Each goes on from its own newest checkpoint. Those that are behind the others catch up first.

    Args:
        trainers: with as many steps, all with a directory or none.

    Raises:
        HerdError: a loss is not a number; names the step and the first layer that gave none.
    """
    with ExitStack() as stack:
        for trainer in trainers:
            stack.enter_context(trainer.running())
        stop = stack.enter_context(StopRequest()) if trainers[0].store else None
        while most := max(trainer.left for trainer in trainers):
            for trainer in trainers:
                if trainer.left == most:
                    trainer.step()
            if stop is not None:
                _between_steps(trainers, stop)


def _between_steps(trainers: Sequence[Trainer], stop: StopRequest) -> None:
    """Save when it is time, end when a rank was asked to or a save has failed; all ranks decide alike."""
    stores = [trainer.store for trainer in trainers if trainer.store]
    late = any(trainer.is_late for trainer in trainers)
    own = torch.tensor([stop.number, int(late), int(any(store.has_failed for store in stores))])
    asked, late, failed = trainers[0].state.ranks.maximum(own).tolist()
    if failed:  # going on would be for nothing
        for store in stores:
            store.wait()
    if asked:
        for trainer in trainers:
            trainer.finish()
        first = trainers[0]
        stop.act(asked, f"step {first.state.progress.step} of {first.options.steps} is saved in "
                        f"{stores[0].directory}, the same command goes on from there")
    for trainer in trainers:
        trainer.save(late=bool(late))


def recompute_layers(model: Llama4) -> None:
    """Let every decoder layer keep its input only, and compute its activations again in the backward pass."""
    for layer in model.decoder.layers:
        forward = layer.forward
        layer.forward = partial(checkpoint, forward, use_reentrant=False, context_fn=recompute_contexts)
