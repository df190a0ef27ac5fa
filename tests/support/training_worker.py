"""One rank of the tests over real processes: trains case after case, writes results as rank 0."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from herdgraph.errors import HerdError
from herdgraph.model.config import HerdConfig
from herdgraph.model.config.presets import TINY
from herdgraph.model.llama4.model import Llama4
from herdgraph.model.training.data import Batch
from herdgraph.model.training.dtensor import full_tensor
from herdgraph.model.training.fp8.amax_history import trained_amaxes
from herdgraph.model.training.fp8.autocast import Fp8Scaling
from herdgraph.model.training.fp8.linear import Fp8Options, fp8_autocast, prepare_for_fp8
from herdgraph.model.training.moe.experts import ExpertOptions, mixtures, plain_state_dict, prepare_for_training
from herdgraph.model.training.parallel.ranks import ParallelOptions, Ranks
from herdgraph.model.training.parallel.sharding import shard
from herdgraph.model.training.train_options import TrainOptions
from herdgraph.model.training.trainer import Trainer
from support.small_runs import OPTIMIZER, Fixture

BATCHES = 4
"""Of a step, over all ranks."""

TOKENS_PER_TILE = 4


@dataclass(frozen=True)
class Case:
    """A short run.

    Attributes:
        expert, tensor: see ``ParallelOptions``.
        pictures: with an image tower, and pictures in some batches.
        skew: all tokens go to one expert.
        broken: in the third step the first rank's picture is not finite.
        top_k: experts of a token.
        directory: for checkpoints, every two steps; among the results if it is relative.
        kill_at: step after which rank 1 kills itself, or a process alone gives up, 0 for none.
    """

    expert: int = 1
    tensor: int = 1
    pictures: bool = False
    skew: bool = False
    broken: bool = False
    top_k: int = 1
    precision: Literal["fp32", "fp8"] = "fp32"
    recipe: Fp8Scaling = "tensorwise"
    recompute: bool = False
    steps: int = 4
    directory: str = ""
    kill_at: int = 0

    def among(self, folder: Path) -> Case:
        """The case with its directory in a folder."""
        return replace(self, directory=self.directory and str(folder / self.directory))

    @property
    def config(self) -> HerdConfig:
        """TINY with as many heads as four ranks can share, and one layer of each of its kinds.

        Dense and rotating, routed and rotating, routed and without positions.
        """
        rotates = (True, True, False)
        text = replace(TINY.text, num_kv_heads=4, num_experts=8, top_k=self.top_k, num_layers=3, moe_layers=(1, 2),
                       rope_layers=rotates, chunked_layers=rotates)
        assert TINY.vision is not None
        vision = replace(TINY.vision, num_heads=4, num_layers=1)
        return replace(TINY, text=text, vision=vision if self.pictures else None)


class Dealt(Fixture):
    """A data rank's share of the batches that one process would accumulate, with unequal numbers of labels.

    With pictures, the first batches of a step have two and one, the others none; every third step has none at all.
    """

    def __init__(self, rank: int, world: int, case: Case) -> None:
        super().__init__()
        self.rank, self.world, self.case = rank, world, case

    def __iter__(self) -> Iterator[Batch]:
        batches = (self.varied(batch, place) for place, batch in enumerate(super().__iter__(), self.at))
        while True:
            dealt: list[Batch] = [next(batches) for _ in range(self.world)]
            yield dealt[self.rank]

    def varied(self, batch: Batch, place: int) -> Batch:
        step, place = divmod(place, BATCHES)
        batch.labels_BT[0, :3 * place] = -100
        tiles = {0: 2, 1: 1}.get(place, 0) if self.case.pictures and step % 3 != 1 else 0
        if not tiles:
            return batch
        ids_BT = batch.input_ids_BT.clone()
        ids_BT[1, 1:1 + tiles * TOKENS_PER_TILE] = TINY.image_token_id
        generator = torch.Generator().manual_seed(step * BATCHES + place)
        pixels_NCHW = torch.randn(tiles, 3, 28, 28, generator=generator)
        pixels_NCHW[0, 0, 0, 0] += float("nan") if self.case.broken and step == 2 and place == 0 else 0
        return replace(batch, input_ids_BT=ids_BT, pixels_NCHW=pixels_NCHW)


def model_of(case: Case) -> Llama4:
    torch.manual_seed(0)
    model = prepare_for_training(Llama4(case.config), ExpertOptions(bias_rate=0.0 if case.skew else 1e-3, bias_fade=0))
    if case.precision == "fp8":
        prepare_for_fp8(model)
    for _, mixture in mixtures(model):
        mixture.selection_bias[5] = 1e3 * case.skew
    return model


def train(case: Case, ranks: Ranks) -> dict[str, Any]:
    """Losses, norms and counts by step; whole gradients of the first step and whole weights at the end."""
    model = model_of(case)
    if ranks.mesh is not None:
        shard(model, ranks)
    loader = Dealt(ranks.data_rank, ranks.data_ranks, case)
    held_out = [batch for batch, _ in zip(Dealt(0, 1, replace(case, broken=False)), range(3), strict=False)]
    options = TrainOptions(steps=case.steps, save_every=2, accumulate=BATCHES // ranks.data_ranks,
                           precision=case.precision, recompute=case.recompute)
    trainer = Trainer(
        model, loader, options, replace(OPTIMIZER, ema=0.5), held_out=held_out, ranks=ranks,
        directory=Path(case.directory) if case.directory else None,
        autocast=lambda: fp8_autocast(Fp8Options(case.recipe)))
    found: dict[str, Any] = {"gradients": {}, "norms": [], "loads": []}

    def on_optimizer(*_) -> None:
        if not found["gradients"]:
            found["gradients"] = {
                name: full_tensor(parameter.grad).clone() for name, parameter in model.named_parameters()
                if parameter.grad is not None}

    def on_step(progress, record) -> None:
        found["norms"].append(record["gradient_norm"])
        found["loads"].append([value for name, value in record.items() if name.startswith("load/")])
        if progress.step == case.kill_at and ranks.count == 1:
            raise KeyboardInterrupt
        if progress.step == case.kill_at and ranks.rank == 1:
            trainer.store.wait()  # which checkpoint is the newest then is not left to chance
            os.kill(os.getpid(), signal.SIGKILL)

    trainer.on_step = on_step
    trainer.state.optimizer.register_step_pre_hook(on_optimizer)
    try:
        progress = trainer.fit()
    except HerdError as error:
        return {"error": str(error)}
    assert trainer.state.average is not None
    return found | {
        "losses": progress.losses, "held_out": progress.held_out[case.steps],
        "weights": {name: full_tensor(value) for name, value in plain_state_dict(model).items()},
        "average": {name: full_tensor(value) for name, value in trainer.state.average.items()},
        "amaxes": trained_amaxes(model, ranks.maximum),
    }


def main() -> None:
    """Arguments: cases as a JSON list, directory for ``results.pt``."""
    folder, results = Path(sys.argv[2]), []
    for case in (Case(**values) for values in json.loads(sys.argv[1])):
        ranks = Ranks.from_environment(ParallelOptions(case.expert, case.tensor))
        results.append(train(case.among(folder), ranks))
    if ranks.first:
        torch.save(results, folder / "results.pt")
    ranks.close()


if __name__ == "__main__":
    main()
