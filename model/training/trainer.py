"""The training loop: batches in, steps, records, checkpoints.

One step is ``accumulate`` batches on every rank. The loss is a sum over labelled tokens, divided by their number over
all batches and ranks of the step, so that it does not depend on how they were cut up.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...errors import HerdError
from ..llama4.model import Llama4
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

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainOptions:
    """The loop.

    Attributes:
        steps: optimizer steps of the run.
        accumulate: batches per step and rank.
        precision: of matrix products: fp32, bf16 by autocast, or fp8 in attention and feed-forwards and bf16 elsewhere.
        recompute: compute each layer again in the backward pass instead of keeping its activations.
        log_every: steps between log lines and records.
        evaluate_every: steps between held-out losses, 0 for the end only.
        save_every: steps between checkpoints, 0 for none by steps.
        save_minutes: minutes between checkpoints, which a killed run loses at most; 0 for none by time. There is always
            one at the end.
        seed: of new weights and of the order of samples.
    """

    steps: int = 1000
    accumulate: int = 1
    precision: Literal["fp32", "bf16", "fp8"] = "fp32"
    recompute: bool = False
    log_every: int = 10
    evaluate_every: int = 0
    save_every: int = 0
    save_minutes: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        bounds = {"steps": 0, "accumulate": 1, "log_every": 1, "evaluate_every": 0, "save_every": 0, "save_minutes": 0,
                  "seed": 0}
        for name, least in bounds.items():
            if not (value := getattr(self, name)) >= least:
                raise HerdError(f"train.{name} is {value}, it must be at least {least}")


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
        if self.store is not None and (found := self.store.restore(self.state)):
            self._tell_resumed(found)
        self._saved = time.monotonic()
        with RunLog(self.directory) as log, self.store or nullcontext():
            if self.state.progress.step < self.options.steps:
                self._steps(log)
            if self.store is not None:
                self.store.finish(self.state)
        return self.state.progress

    def _tell_resumed(self, found: Path) -> None:
        step, steps = self.state.progress.step, self.options.steps
        if step < steps:
            saved = time.strftime("%Y-%m-%d %H:%M", time.localtime((found / "run.json").stat().st_mtime))
            logger.info("resuming from step %d of %d, saved %s: weights, optimizer and place in the data are those of "
                        "%s", step, steps, saved, found)

    def _steps(self, log: RunLog) -> None:
        peak = measured_peak(torch.float32 if self.options.precision == "fp32" else torch.bfloat16)
        batches = iter(self.state.loader)
        self.state.model.train()
        with StopRequest() if self.store else nullcontext() as stop:
            while self.state.progress.step < self.options.steps:
                self._recorded_step([next(batches) for _ in range(self.options.accumulate)], log, peak)
                if stop is not None:
                    self._between_steps(stop)

    def _between_steps(self, stop: StopRequest) -> None:
        """Save when it is time, end when a rank was asked to or a save has failed; all ranks decide alike."""
        assert self.store is not None, "there is nothing to end for without it"
        options, step = self.options, self.state.progress.step
        late = 0 < options.save_minutes * 60 <= time.monotonic() - self._saved
        own = torch.tensor([stop.number, int(late), int(self.store.has_failed)])
        asked, late, failed = self.state.ranks.maximum(own).tolist()
        if failed:  # going on would be for nothing
            self.store.wait()
        if asked:
            self.store.finish(self.state)
            stop.act(asked, f"step {step} of {options.steps} is saved in {self.store.directory}, the same command goes "
                            "on from there")
        if step < options.steps and (late or (options.save_every and step % options.save_every == 0)):
            logger.info("saving step %d of %d in %s", step, options.steps, self.store.directory)
            self.store.save(self.state)
            self._saved = time.monotonic()

    def _recorded_step(self, batches: list[Batch], log: RunLog, peak: float) -> None:
        started, options, state = time.perf_counter(), self.options, self.state
        progress, ranks = state.progress, state.ranks
        loss, record = self._step(batches)
        seconds = time.perf_counter() - started
        progress.losses.append(loss)
        step = progress.step
        shape = batches[0].input_ids_BT.shape
        rate = len(batches) * shape.numel() / seconds
        record |= {"loss": loss, "tokens_per_second": rate * ranks.data_ranks,
                   "mfu": rate * flops_per_token(state.model.config, shape[1]) / (peak * ranks.parallel.tensor)}
        last = step == options.steps
        if self.held_out and (last or (options.evaluate_every and step % options.evaluate_every == 0)):
            record["held_out"] = progress.held_out[step] = held_out_loss(state.model, self.held_out)
        if step % options.log_every == 0 or last:
            record |= {f"samples/{kind}": ranks.sum(state.loader.counts[kind]) for kind in ("cut", "skipped")}
            log.write(step, record)
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

    def _precision(self) -> AbstractContextManager[object]:
        if self.options.precision == "fp32":
            return nullcontext()
        device = next(self.state.model.parameters()).device.type
        stack = ExitStack()
        stack.enter_context(torch.autocast(device, torch.bfloat16))
        if self.options.precision == "fp8":
            stack.enter_context(self.autocast())
        return stack

    def _balance(self) -> dict[str, float]:
        """Shift the routers' biases by the load of this step; how even it was, largest share of the mean, and which
        share of the tokens the biases moved.
        """
        found = {}
        for name, (counts_E, moved) in update_selection_biases(self.state.model, self.state.ranks.sum_tensor).items():
            found[f"load/{name}"] = float(counts_E.max() / counts_E.float().mean().clamp(min=1e-9))
            found[f"moved/{name}"] = moved
        return found

    def _blame(self, batch: Batch) -> str:
        """The first module whose output is not finite, found by running the batch once more."""
        bad: list[str] = []
        hooks = [
            module.register_forward_hook(lambda _m, _i, out, name=name: bad.append(name) if _broken(out) else None)
            for name, module in self.state.model.named_modules() if not list(module.children())
        ]
        with torch.no_grad(), self._precision():
            self.state.objective(self.state.model, batch, self.state.progress.step)
        for hook in hooks:
            hook.remove()
        return f"{bad[0]} is the first to give values that are not finite" if bad else "no single layer is to blame"


def _broken(output: object) -> bool:
    return isinstance(output, Tensor) and output.is_floating_point() and not bool(torch.isfinite(output).all())


def bad_gradient(model: nn.Module) -> str:
    """The first parameter whose gradient is not finite."""
    return next((name for name, parameter in model.named_parameters()
                 if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all())), "no parameter")


def recompute_layers(model: Llama4) -> None:
    """Let every decoder layer keep its input only, and compute its activations again in the backward pass."""
    for layer in model.decoder.layers:
        forward = layer.forward
        layer.forward = partial(checkpoint, forward, use_reentrant=False, context_fn=recompute_contexts)
