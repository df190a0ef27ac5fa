"""What all recipes share: data in, a model trained, a checkpoint in Hugging Face layout out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from ....errors import HerdError
from ...checkpoint import open_checkpoint, save_checkpoint
from ...checkpoint.base import PROCESSOR_FILES
from ...config import HerdConfig
from ...data import TextPages, hold_out, open_samples
from ...llama4.model import Llama4
from ..data import Batch, Encoder, Loader
from ..dtensor import full_tensor
from ..fp8.amax_history import save_amaxes, trained_amaxes
from ..fp8.linear import Fp8Options, fp8_autocast, prepare_for_fp8
from ..moe.experts import ExpertOptions, canonical_name, plain_state_dict, prepare_for_training
from ..objective import Objective
from ..optim import OptimizerOptions
from ..parallel.ranks import ParallelOptions, Ranks
from ..parallel.sharding import shard
from ..state import TrainProgress
from ..train_options import TrainOptions
from ..trainer import Trainer
from .summary import DataSummary, summarize

logger = logging.getLogger(__name__)

OnStep = Callable[[TrainProgress, dict[str, float]], None]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Data, sizes and output of a run.

    Attributes:
        data: files and directories of samples: .txt, .jsonl, .tar, pictures, saved datasets.
        output: directory of the run, which continues from the last checkpoint in it: records, checkpoints/, and at the
            end model/ in Hugging Face layout; after FP8 training also calibration/, which herdgraph build takes.
        rows: rows of a batch.
        seq_len: tokens of a row; longer samples are cut, text files are read in pages that fit.
        held_out: share of the samples that is kept for the held-out loss, 0 to 1.
        held_out_batches: batches of the held-out samples that are used.
        broken: stop at a sample that cannot be used, or skip it.
        train: steps, precision, records and checkpoints.
        optimizer: AdamW and its schedule.
        experts: routing and its balance.
        fp8: scaling of FP8 products, for --train.precision fp8.
        parallel: how ranks are arranged.
    """

    data: tuple[Path, ...]
    output: Path
    rows: int = 8
    seq_len: int = 256
    held_out: float = 0.02
    held_out_batches: int = 8
    broken: Literal["stop", "skip"] = "stop"
    train: TrainOptions = field(default_factory=TrainOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    experts: ExpertOptions = field(default_factory=ExpertOptions)
    fp8: Fp8Options = field(default_factory=Fp8Options)
    parallel: ParallelOptions = field(default_factory=ParallelOptions)

    def __post_init__(self) -> None:
        for name, least in (("rows", 1), ("seq_len", 2), ("held_out_batches", 0)):
            if (value := getattr(self, name)) < least:
                raise HerdError(f"{name} is {value}, it must be at least {least}")

    @property
    def model(self) -> Path:
        """Where the trained model is written."""
        return self.output / "model"


def loaders(options: RunOptions, config: HerdConfig, files: Path, ranks: Ranks) -> tuple[Loader, list[Batch]]:
    """The batches that a rank trains on, and those that it is evaluated on; logs what data there is.

    Args:
        options: of the run.
        config: the model.
        files: directory with its tokenizer and image processor.
        ranks: this process among others.

    Raises:
        HerdError: no data, or samples that cannot be used.
    """
    if not options.data:
        raise HerdError("no data was given: name files or directories (--data)")
    encoder = Encoder(files, config, max_tokens=options.seq_len, too_long="cut")
    samples = open_samples(options.data, lambda path: TextPages(path, encoder.tokens_of, encoder.page_tokens))
    train, held_out = hold_out(samples, options.held_out)
    pad = config.text.pad_token_id or 0
    loader = Loader(train, encoder, rows=options.rows, seq_len=options.seq_len, pad_id=pad, seed=options.train.seed,
                    rank=ranks.data_rank, world=ranks.data_ranks, broken=options.broken)
    if ranks.first:
        _announce(options, summarize(train, held_out, encoder), ranks)
    if not len(held_out):
        return loader, []
    evaluation = Loader(held_out, encoder, rows=options.rows, seq_len=options.seq_len, pad_id=pad, epochs=1,
                        shuffle=False, broken="skip")
    return loader, [batch for _, batch in zip(range(options.held_out_batches), evaluation, strict=False)]


def _announce(options: RunOptions, data: DataSummary, ranks: Ranks) -> None:
    """Say what is trained on, how long, and where it goes."""
    train = options.train
    rows = options.rows * train.accumulate * ranks.data_ranks
    epochs = f", about {train.steps * rows * options.seq_len / data.tokens:.1f} epochs" if data.tokens else ""
    saves = [text for count, text in ((train.save_minutes, f"every {train.save_minutes:g} minutes"),
                                      (train.save_every, f"every {train.save_every} steps")) if count]
    logger.info("data: %s", data)
    logger.info("steps: %d of %d rows of %d tokens%s, in %s", train.steps, rows, options.seq_len, epochs,
                train.precision)
    logger.info("checkpoints: %s, in %s; the model at the end: %s", " and ".join([*saves, "at the end"]),
                options.output / "checkpoints", options.model)
    if options.fp8 != Fp8Options() and train.precision != "fp8":
        logger.warning("--fp8.name counts for --train.precision fp8 only, this run computes in %s", train.precision)
    if train.evaluate_every and not data.held_out:
        logger.warning("nothing is held out, so there is no held-out loss every %d steps", train.evaluate_every)


def train_model(
    model: Llama4, options: RunOptions, files: Path, *, objective: Objective | None = None,
    on_step: OnStep | None = None,
) -> TrainProgress:
    """Train a model and write it.

    Args:
        model: in float32, whole.
        options: of the run.
        files: directory with tokenizer and image processor, which are copied.
        objective: what is minimised; next tokens when None.
        on_step: called after each step.

    Raises:
        HerdError: unusable data, a loss that is no number, or an output that cannot be written.
    """
    ranks = Ranks.from_environment(options.parallel)
    trainer = trainer_of(model, options, files, ranks, objective=objective, on_step=on_step)
    progress = trainer.fit()
    write_model(trainer, options, files)
    ranks.close()
    return progress


def trainer_of(
    model: Llama4, options: RunOptions, files: Path, ranks: Ranks, *, objective: Objective | None = None,
    on_step: OnStep | None = None,
) -> Trainer:
    """What trains a model; arguments as of ``train_model``.

    Raises:
        HerdError: unusable data.
    """
    torch.manual_seed(options.train.seed)
    prepare_for_training(model, options.experts)
    if options.train.precision == "fp8":
        prepare_for_fp8(model)
    loader, held_out = loaders(options, model.config, files, ranks)
    if ranks.mesh is not None:
        shard(model, ranks)
    return Trainer(
        model, loader, options.train, options.optimizer, objective=objective, held_out=held_out,
        directory=options.output, ranks=ranks, autocast=lambda: fp8_autocast(options.fp8),
        on_step=on_step or (lambda _p, _r: None),
    )


def write_model(trainer: Trainer, options: RunOptions, files: Path) -> None:
    """Write what was trained; every rank has to call it.

    Args:
        trainer: at its last step.
        options: of the run.
        files: directory with tokenizer and image processor, which are copied.

    Raises:
        HerdError: it cannot be written.
    """
    model, ranks, average = trainer.state.model, trainer.state.ranks, trainer.state.average
    if ranks.first:
        logger.info("writing %s", options.model)
    weights = plain_state_dict(model)
    if average is not None:
        weights |= {canonical_name(name): value for name, value in average.items()}
    weights = {name: full_tensor(value) for name, value in weights.items()}
    amaxes = trained_amaxes(model, ranks.maximum)
    if ranks.first:
        save_model(options.model, model.config, weights, files)
        if options.train.precision == "fp8":
            with open_checkpoint(options.model) as checkpoint:
                save_amaxes(amaxes, options.output / "calibration", checkpoint, overwrite=True)


def save_model(directory: Path, config: HerdConfig, weights: dict[str, torch.Tensor], files: Path) -> None:
    """Write a checkpoint in Hugging Face layout, in bfloat16, with the processor files of another directory."""
    processor_files = {name: files / name for name in PROCESSOR_FILES if (files / name).is_file()}
    tensors = ((name, value.bfloat16()) for name, value in weights.items())
    save_checkpoint(directory, config, tensors, processor_files=processor_files, overwrite=True)
