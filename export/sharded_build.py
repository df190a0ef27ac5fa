"""A decoder split over ranks: each rank's part is lowered, cut at its collectives and written by itself.

The whole decoder is captured once. A rank's graph is that of the whole with its stage kept and its width split; from
then on every pass of the target sees an ordinary decoder that happens to be smaller. Memory is bounded by two graphs,
whatever the number of ranks.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from ..errors import HerdError
from ..files import require_room
from ..model.checkpoint.sharded import sharded
from ..model.config import HerdConfig
from ..model.config.shard_plan import ShardPlan
from ..model.quantization.sharded_calibration import RankCalibration
from ..runtimes.bundle.shards import PartitionEntry, Shards, entry_of
from .job import BuildResult, Job, active_bytes, weight_bytes
from .passes import KeepStage, SplitWidth
from .passes.shard.partition import partition_at_collectives, remove_ends
from .targets.target import Target
from .weights.writer import stream


def check_shards(plan: ShardPlan, config: HerdConfig, target: Target) -> None:
    """Refuse what cannot be split.

    Raises:
        HerdError: the target runs on one device only, or the plan does not fit the model.
    """
    if not target.is_lowered:
        raise HerdError(f"target {target.name} is not lowered and runs on one device, the plan {plan} is for "
                        f"{plan.world}: choose cpu, cuda or a TensorRT target")
    plan.check(config)


def write_shards(job: Job, directory: Path, output: Path, plan: ShardPlan) -> BuildResult:
    """Write all ranks, and the image graph, which runs on rank 0."""
    made, ranks, done = BuildResult(), [], 0
    whole = job.captured("decoder")
    if "vision" in job.roles:
        vision = job.lowered("vision", job.captured("vision"))
        done = weight_bytes(vision)
        job.write(vision, directory, "vision", made)
    for rank in range(plan.world):
        model = _lowered(job, whole.clone(), plan, rank)
        expected = weight_bytes(model) * (plan.world - rank)  # ranks are alike
        job.progress.weights(done + expected)
        require_room(output, expected, "the rest of the bundle")
        done += weight_bytes(model)
        made.active_bytes += active_bytes(model, job.checkpoint.config.text)
        job.progress.stage(f"writing weights of rank {rank}")
        partitions = _write_rank(job, model, directory / f"rank{rank}", made)
        ranks.append(entry_of(plan, job.checkpoint.config.text, rank, partitions))
    made.graphs["decoder"] = ranks[0].partitions[0].graph
    made.shards = Shards(plan, tuple(ranks))
    return made


def _lowered(job: Job, model: ir.Model, plan: ShardPlan, rank: int) -> ir.Model:
    config, calibration = job.config, job.calibration
    for split in (KeepStage(plan, rank, config.text.num_layers), SplitWidth(plan, rank, config)):
        split(model)
    if calibration is not None:
        calibration = RankCalibration.of(calibration, plan, config, rank)
    return job.lowered(f"decoder of rank {rank}", model, sharded(job.checkpoint, plan, rank), calibration)


def _write_rank(job: Job, model: ir.Model, directory: Path, made: BuildResult) -> tuple[PartitionEntry, ...]:
    """Write a rank's partitions, which share one file of weights, or its plan."""
    directory.mkdir()
    if job.write_plan is not None:
        received, sent = remove_ends(model.graph)
        name, made.plans[f"{directory.name}/decoder"] = job.compiled(job.write_plan, model, directory, "decoder")
        return (PartitionEntry(f"{directory.name}/{name}", received, sent),)
    stream(model, directory, "decoder.data", job.progress.written)
    entries = []
    for index, partition in enumerate(partition_at_collectives(model)):
        path = directory / f"decoder.{index:02}.onnx"
        job.describe(partition.model, f"{directory.name} partition {index}")
        ir.save(partition.model, path)
        entries.append(PartitionEntry(f"{directory.name}/{path.name}", partition.before, partition.after))
    return tuple(entries)
