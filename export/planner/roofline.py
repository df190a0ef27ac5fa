"""How long a call takes at least, and what limits it.

Of a stage, with the rates of its device and what is reached of them (``devices.Efficiency``):

    memory       weights / bandwidth + keys and values / bandwidth, each at the share that is reached of it
    compute      products / their rate + float operations / theirs
    collectives  AllReduce of n bytes over w ranks: 2 ceil(log2 w) steps, 2 (w-1)/w · n / link; AllGather: half of both
    launches     layers · layer_seconds
    stage        max(memory, compute) + collectives + launches        nothing of it overlaps in our runtime

A batch goes through a pipeline in m micro-batches, as many as ``runtimes/distributed/front_end.py`` makes of it. A step
of decoding ends with the last of them:

    step = sum of stages + (m - 1) · slowest stage + sends

and the chunks of a prompt follow each other without such a wait: a chunk costs what the slowest stage takes.

These are estimates from data sheets and assumed efficiencies. Routing is taken as even, which trained routers are only
nearly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...model.config import HerdConfig
from ...model.config.shard_plan import ShardPlan
from ...runtimes.distributed.front_end import PART
from .devices import Fleet
from .memory import Workload, chunk_len, representative_stages
from .storage import Storage
from .traffic import Call, Collective, Work, sends, work_of

_SEGMENTS = 16
"""A prompt is timed at so many points along the context."""


@dataclass(frozen=True)
class Seconds:
    """Where the time of a call goes."""

    memory: float
    compute: float
    collectives: float
    launches: float

    @property
    def total(self) -> float:
        """Of the call: memory and arithmetic at the same time, the others one after the other."""
        return max(self.memory, self.compute) + self.collectives + self.launches

    @property
    def limit(self) -> str:
        """What takes longest."""
        parts = {"bandwidth": self.memory, "compute": self.compute, "collectives": self.collectives,
                 "launches": self.launches}
        return max(parts, key=lambda name: parts[name])


@dataclass(frozen=True)
class Rate:
    """A prediction.

    Attributes:
        tokens_per_second: of all sequences and replicas.
        seconds: of a step of decoding, or of the whole prompt.
        limit: what takes longest: bandwidth, compute, collectives or launches.
    """

    tokens_per_second: float
    seconds: float
    limit: str


def stage_seconds(work: Work, storage: Storage, fleet: Fleet) -> Seconds:
    """Time of one call on the busiest rank of a stage."""
    device, reached = fleet.device, fleet.device.efficiency
    products = work.products / device.rate(storage.products) + work.float_operations / device.rate(storage.floats)
    return Seconds(
        memory=(work.weight_bytes / reached.weights + work.cache_bytes / reached.caches) / device.bandwidth,
        compute=products / reached.compute,
        collectives=sum(collective_seconds(one, fleet) for one in work.collectives),
        launches=work.layers * reached.layer_seconds,
    )


def collective_seconds(collective: Collective, fleet: Fleet, *, inside: bool | None = None) -> float:
    """Time of all exchanges of a kind; groups that leave a machine go at the pace of the network."""
    device, ranks = fleet.device, collective.ranks
    if fleet.inside_machines(ranks) if inside is None else inside:
        latency, bandwidth = device.link_latency, device.link_bandwidth
    else:
        latency, bandwidth = device.network_latency, device.network_bandwidth
    bandwidth *= device.efficiency.link
    if collective.op == "send":
        return collective.count * (latency + collective.bytes / bandwidth)
    rounds = 2 if collective.op == "all_reduce" else 1
    steps, share = rounds * math.ceil(math.log2(ranks)), rounds * (ranks - 1) / ranks
    return collective.count * (steps * latency + share * collective.bytes / bandwidth)


def decode_rate(
    config: HerdConfig, plan: ShardPlan, storage: Storage, fleet: Fleet, workload: Workload, replicas: int = 1
) -> Rate:
    """Decoding ``workload.batch`` sequences, spread over replicas, after ``workload.context`` tokens each."""
    batch = -(-workload.batch // replicas)
    micro_batches = max(1, min(plan.pipeline, batch // PART))
    rows = -(-batch // micro_batches)
    call = Call(rows, 1, workload.context - 1, rows)
    stages = _stages(config, plan, storage, fleet, call)
    slowest = max(stages, key=lambda stage: stage.total)
    between = sum(collective_seconds(one, fleet, inside=_in_one_machine(plan, fleet))
                  for one in sends(config.text, plan, storage, call))
    seconds = sum(stage.total for stage in stages) + (micro_batches - 1) * slowest.total + between
    return Rate(workload.batch / seconds, seconds, "collectives" if between > seconds / 2 else slowest.limit)


def _stages(config: HerdConfig, plan: ShardPlan, storage: Storage, fleet: Fleet, call: Call) -> list[Seconds]:
    first = representative_stages(config, plan)
    kinds = {stage: stage_seconds(work_of(config, plan, storage, stage, call), storage, fleet) for stage in set(first)}
    return [kinds[stage] for stage in first]


def _in_one_machine(plan: ShardPlan, fleet: Fleet) -> bool:
    """Whether no stage sends to another machine."""
    return plan.world <= fleet.per_machine and fleet.inside_machines(plan.world)


def prefill_rate(
    config: HerdConfig, plan: ShardPlan, storage: Storage, fleet: Fleet, tokens: int, replicas: int = 1
) -> Rate:
    """Predicted rate of a prompt of ``tokens`` on each replica, in the chunks that the runtime cuts it into."""
    seconds, limits = 0.0, []
    segments = min(_SEGMENTS, tokens)
    for index in range(segments):
        middle = (2 * index + 1) * tokens // (2 * segments)
        chunk = min(chunk_len(storage, config.text.num_heads // plan.width, middle), tokens)
        past = middle // chunk * chunk
        slowest = max(_stages(config, plan, storage, fleet, Call(1, chunk, past, 0)), key=lambda stage: stage.total)
        between = sum(collective_seconds(one, fleet, inside=_in_one_machine(plan, fleet))
                      for one in sends(config.text, plan, storage, Call(1, chunk, past, 0))[:1])
        spent = (slowest.total + between / max(1, plan.pipeline - 1)) * tokens / segments / chunk
        seconds += spent
        limits.append((spent, slowest.limit))
    weight = {limit: sum(spent for spent, name in limits if name == limit) for _, limit in limits}
    return Rate(replicas * tokens / seconds, seconds, max(weight, key=lambda name: weight[name]))
