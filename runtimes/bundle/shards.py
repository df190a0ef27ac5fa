"""What the manifest of a sharded bundle says: the plan, and for every rank its pieces and how ranks meet around them.

A rank runs its pieces in order, fed from one dictionary of values by name. Before the first piece it may receive what
the stage before sent, and after every piece it exchanges outputs:

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

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import HerdError
from ...model.config import TextConfig
from ...model.config.shard_plan import ShardPlan
from .validate import strict

_FIELDS: dict[str, dict[str, type]] = {
    "all_reduce": {"op": str, "value": str, "result": str},
    "all_gather": {"op": str, "value": str, "result": str, "axis": int},
    "send": {"op": str, "value": str},
    "recv": {"op": str, "value": str},
}


@dataclass(frozen=True)
class CollectiveOp:
    """One meeting of ranks.

    Attributes:
        op: see above.
        value: name of what this rank gives, or receives.
        result: name of what comes out of it, empty for ``send`` and ``recv``.
        axis: along which results are put side by side.
    """

    op: str
    value: str
    result: str = ""
    axis: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain dictionary with what the operation needs."""
        return {name: getattr(self, name) for name in _FIELDS[self.op]}

    @classmethod
    def from_json(cls, raw: object) -> CollectiveOp:
        """Restore what ``to_json`` wrote."""
        op = raw.get("op") if isinstance(raw, dict) else None
        if not isinstance(op, str) or op not in _FIELDS:
            raise HerdError(f"an exchange of a shard is {op!r}, it must be one of {', '.join(_FIELDS)}: rebuild the "
                            "bundle")
        return cls(**strict(f"exchange {op!r}", raw, _FIELDS[op]))


@dataclass(frozen=True)
class PartitionEntry:
    """One graph or plan of a rank, and the exchanges around it."""

    graph: str
    before: tuple[CollectiveOp, ...]
    after: tuple[CollectiveOp, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain dictionary."""
        around = {name: [exchange.to_json() for exchange in getattr(self, name)] for name in ("before", "after")}
        return {"graph": self.graph} | around

    @classmethod
    def from_json(cls, raw: object) -> PartitionEntry:
        """Restore what ``to_json`` wrote."""
        values = strict("a piece of a shard", raw, {"graph": str, "before": list, "after": list})
        before, after = (tuple(map(CollectiveOp.from_json, values[name])) for name in ("before", "after"))
        return cls(values["graph"], before, after)


@dataclass(frozen=True)
class RankEntry:
    """One rank.

    Attributes:
        layers: first layer and end.
        heads: query heads.
        kv_heads: key/value heads of its caches.
        pieces: in order.
    """

    layers: tuple[int, int]
    heads: int
    kv_heads: int
    pieces: tuple[PartitionEntry, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain dictionary."""
        return {"layers": list(self.layers), "heads": self.heads, "kv_heads": self.kv_heads,
                "pieces": [piece.to_json() for piece in self.pieces]}

    @classmethod
    def from_json(cls, raw: object) -> RankEntry:
        """Restore what ``to_json`` wrote."""
        values = strict("a rank", raw, {"layers": list, "heads": int, "kv_heads": int, "pieces": list})
        pieces = tuple(map(PartitionEntry.from_json, values["pieces"]))
        return cls(tuple(values["layers"]), values["heads"], values["kv_heads"], pieces)


@dataclass(frozen=True)
class Shards:
    """The shards of a bundle: one entry for every rank of the plan."""

    plan: ShardPlan
    ranks: tuple[RankEntry, ...]

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], text: TextConfig) -> Shards:
        """Restore what ``to_json`` wrote.

        Args:
            raw: the manifest's ``shards``.
            text: the whole model.

        Raises:
            HerdError: a value is missing, unknown, of the wrong kind, or not what the plan gives for the model.
        """
        values = strict("shards", raw, {"plan": dict, "ranks": list})
        plan = ShardPlan(**strict("the plan", values["plan"], dict.fromkeys(ShardPlan().to_json(), int)))
        ranks = tuple(map(RankEntry.from_json, values["ranks"]))
        if len(ranks) != plan.world:
            raise HerdError(f"shards has {len(ranks)} ranks, the plan {plan} has {plan.world}: rebuild the bundle")
        for rank, entry in enumerate(ranks):
            _check(plan, text, rank, entry)
        return cls(plan, ranks)

    def to_json(self) -> dict[str, Any]:
        """Plain dictionary, the manifest's ``shards``."""
        return {"plan": self.plan.to_json(), "ranks": [rank.to_json() for rank in self.ranks]}

    def graphs(self) -> list[str]:
        """Files of all pieces."""
        return [piece.graph for rank in self.ranks for piece in rank.pieces]


def entry_of(plan: ShardPlan, text: TextConfig, rank: int, pieces: tuple[PartitionEntry, ...]) -> RankEntry:
    """What a plan gives a rank of a model."""
    layers, local = plan.layers_of(plan.stage_of(rank), text.num_layers), plan.local_text(text, rank)
    return RankEntry((layers.start, layers.stop), local.num_heads, local.num_kv_heads, pieces)


def _check(plan: ShardPlan, text: TextConfig, rank: int, entry: RankEntry) -> None:
    wanted = entry_of(plan, text, rank, entry.pieces)
    if entry != wanted:
        found, needed = ((e.layers, e.heads, e.kv_heads) for e in (entry, wanted))
        raise HerdError(f"rank {rank} has layers, heads and key/value heads {found}, the plan {plan} gives {needed}: "
                        "rebuild the bundle")
    if not entry.pieces:
        raise HerdError(f"rank {rank} has no pieces: rebuild the bundle")
