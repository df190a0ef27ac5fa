"""What the manifest of a sharded bundle says: the plan, and for every rank its partitions and the collectives around.

A rank runs its partitions in order, fed from one dictionary of values by name. Before the first one it may receive
what the stage before sent, and after each it exchanges outputs:

==============  ======================================================================================
operation       meaning
==============  ======================================================================================
``all_reduce``  ``result`` is the sum of ``value`` over the ranks of the stage
``all_gather``  ``result`` is ``value`` of all ranks of the stage, side by side along ``axis``
``send``        ``value`` goes to the same place of the next stage (rank + width)
``recv``        ``value`` comes from there (rank - width)
==============  ======================================================================================

TensorRT plans hold the sums and gathers inside; only ``send`` and ``recv`` are left around them.
"""

from __future__ import annotations

from typing import Any

import msgspec

from ...errors import HerdError
from ...model.config import TextConfig
from ...model.config.shard_plan import ShardPlan
from .decode import decode

_RESULTS: dict[str, set[str]] = {
    "all_reduce": {"result"}, "all_gather": {"result", "axis"}, "send": set(), "recv": set(),
}
"""What an operation needs besides ``value``."""


class CollectiveOp(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One exchange between ranks.

    Attributes:
        op: see above.
        value: name of what this rank gives, or receives.
        result: name of what comes out of it; none for ``send`` and ``recv``.
        axis: along which ``all_gather`` puts results side by side.
    """

    op: str
    value: str
    result: str = ""
    axis: int | None = None

    def __post_init__(self) -> None:
        if self.op not in _RESULTS:
            raise ValueError(f"op is {self.op!r}, it must be one of {', '.join(_RESULTS)}")
        given = {name for name, value in (("result", self.result), ("axis", self.axis)) if value not in ("", None)}
        for name in sorted(given ^ _RESULTS[self.op]):
            raise ValueError(f"{self.op} {'takes no' if name in given else 'needs a value'} {name}")


class PartitionEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One graph or plan of a rank, and the collectives before and after it."""

    graph: str
    before: tuple[CollectiveOp, ...]
    after: tuple[CollectiveOp, ...]


class RankEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One rank.

    Attributes:
        layers: first layer and end.
        heads: query heads.
        kv_heads: key/value heads of its caches.
        partitions: in the order in which they run.
    """

    layers: tuple[int, int]
    heads: int
    kv_heads: int
    partitions: tuple[PartitionEntry, ...]


class _Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A ``ShardPlan`` in JSON, where nothing may be left out."""

    tensor: int
    expert: int
    pipeline: int


class Shards(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The shards of a bundle: one entry for every rank of the plan."""

    plan: ShardPlan
    ranks: tuple[RankEntry, ...]

    @classmethod
    def from_json(cls, raw: object, text: TextConfig) -> Shards:
        """Restore what a manifest says.

        Args:
            raw: the manifest's ``shards``.
            text: the whole model.

        Raises:
            HerdError: a value is missing, unknown, of the wrong kind, or not what the plan gives for the model.
        """
        values = decode("shards", raw, dict[str, Any])
        if "plan" in values:
            plan = decode("shards.plan", values["plan"], _Plan)
            values = values | {"plan": ShardPlan(**msgspec.structs.asdict(plan))}
        shards = decode("shards", values, cls)
        shards._check(text)
        return shards

    def _check(self, text: TextConfig) -> None:
        """Compare the ranks with what the plan gives them."""
        plan, advice = self.plan, "rebuild the bundle"
        if len(self.ranks) != plan.world:
            raise HerdError(f"shards has {len(self.ranks)} ranks, the plan {plan} has {plan.world}: {advice}")
        for rank, entry in enumerate(self.ranks):
            wanted = entry_of(plan, text, rank, entry.partitions)
            if entry != wanted:
                found, needed = ((e.layers, e.heads, e.kv_heads) for e in (entry, wanted))
                raise HerdError(f"rank {rank} has layers, heads and key/value heads {found}, the plan {plan} gives "
                                f"{needed}: {advice}")
            if not entry.partitions:
                raise HerdError(f"rank {rank} has no partitions: {advice}")

    def graphs(self) -> list[str]:
        """Files of all partitions."""
        return [partition.graph for rank in self.ranks for partition in rank.partitions]


def entry_of(plan: ShardPlan, text: TextConfig, rank: int, partitions: tuple[PartitionEntry, ...]) -> RankEntry:
    """What a plan gives a rank of a model."""
    layers, local = plan.layers_of(plan.stage_of(rank), text.num_layers), plan.local_text(text, rank)
    return RankEntry((layers.start, layers.stop), local.num_heads, local.num_kv_heads, partitions)
