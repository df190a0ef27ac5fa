"""What all recipes share: data in, a model trained, a checkpoint in Hugging Face layout out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from ....errors import HerdError
from ...checkpoint import open_checkpoint, save_checkpoint
from ...checkpoint.base import PROCESSOR_FILES
from ...config import HerdConfig, read_config
from ...data import hold_out, open_samples
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
from ..trainer import Trainer, TrainOptions

OnStep = Callable[[TrainProgress, dict[str, float]], None]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Data, sizes and output of a run.

    Attributes:
        data: files and directories of samples: JSON lines, text, tar shards, pictures.
        output: directory of the run: records, checkpoints, the result in Hugging Face layout as model/, and after FP8
            training calibration/, which build.py --calibration takes.
        rows: rows of a batch.
        seq_len: tokens of a row.
        held_out: share of the samples that is kept for the held-out loss.
        held_out_batches: batches of the held-out samples that are used.
        broken: stop at a sample that cannot be used, or skip it.
        train: steps, precision, records and checkpoints.
        optimizer: AdamW and its schedule.
        experts: routing and its balance.
        fp8: scaling of FP8 products, for train.precision fp8.
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


def loaders(options: RunOptions, config: HerdConfig, files: Path, ranks: Ranks) -> tuple[Loader, list[Batch]]:
    """The batches that a rank trains on, and those that it is evaluated on.

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
    train, held_out = hold_out(open_samples(list(options.data)), options.held_out)
    encoder = Encoder(files, config, max_tokens=options.seq_len, too_long="cut")
    pad = config.text.pad_token_id or 0
    loader = Loader(train, encoder, rows=options.rows, seq_len=options.seq_len, pad_id=pad, seed=options.train.seed,
                    rank=ranks.data_rank, world=ranks.data_ranks, broken=options.broken)
    if not len(held_out):
        return loader, []
    evaluation = Loader(held_out, encoder, rows=options.rows, seq_len=options.seq_len, pad_id=pad, epochs=1,
                        shuffle=False, broken="skip")
    return loader, [batch for _, batch in zip(range(options.held_out_batches), evaluation, strict=False)]


def train_model(
    model: Llama4, options: RunOptions, files: Path, *, objective: Callable[[Ranks], Objective] | None = None,
    on_step: OnStep | None = None,
) -> TrainProgress:
    """Train a model and write it.

    Args:
        model: in float32, whole.
        options: of the run.
        files: directory with tokenizer and image processor, which are copied.
        objective: gives what is minimised, for a process among others; next tokens when None.
        on_step: called after each step.

    Raises:
        HerdError: unusable data, a loss that is no number, or an output that cannot be written.
    """
    torch.manual_seed(options.train.seed)
    ranks = Ranks.from_environment(options.parallel)
    prepare_for_training(model, options.experts)
    if options.train.precision == "fp8":
        prepare_for_fp8(model)
    loader, held_out = loaders(options, model.config, files, ranks)
    if ranks.mesh is not None:
        shard(model, ranks)
    trainer = Trainer(
        model, loader, options.train, options.optimizer, objective=objective and objective(ranks), held_out=held_out,
        directory=options.output, ranks=ranks, autocast=lambda: fp8_autocast(options.fp8),
        on_step=on_step or (lambda _p, _r: None),
    )
    progress = trainer.fit()
    weights = plain_state_dict(model)
    if trainer.state.average is not None:
        weights |= {canonical_name(name): value for name, value in trainer.state.average.items()}
    weights = {name: full_tensor(value) for name, value in weights.items()}
    amaxes = trained_amaxes(model, ranks.maximum)
    if ranks.first:
        save_model(options.output / "model", model.config, weights, files)
        if options.train.precision == "fp8":
            with open_checkpoint(options.output / "model") as checkpoint:
                save_amaxes(amaxes, options.output / "calibration", checkpoint, overwrite=True)
    ranks.close()
    return progress


def save_model(directory: Path, config: HerdConfig, weights: dict[str, torch.Tensor], files: Path) -> None:
    """Write a checkpoint in Hugging Face layout, in bfloat16, with the processor files of another directory."""
    processor_files = {name: files / name for name in PROCESSOR_FILES if (files / name).is_file()}
    tensors = ((name, value.bfloat16()) for name, value in weights.items())
    save_checkpoint(directory, config, tensors, processor_files=processor_files, overwrite=True)


def open_model(directory: Path) -> Llama4:
    """A model with a checkpoint's weights, in float32.

    Raises:
        HerdError: it cannot be read.
    """
    with open_checkpoint(directory) as checkpoint:
        return Llama4.from_checkpoint(checkpoint)


def new_model(directory: Path, seed: int) -> Llama4:
    """A model with random weights, by the ``config.json`` of a directory.

    Raises:
        HerdError: there is none.
    """
    config = read_config(directory)
    torch.manual_seed(seed)
    return Llama4(config)
