"""A rank's place in the pipeline: from whom hidden states come, to whom they go, and how logits get back to rank 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ...model.config import TextConfig
from ...model.config.shard_plan import ShardPlan
from ..bundle.manifest import Bundle
from ..executors.runner import Runner
from .collectives import Array, Collectives, Values


class Stage:
    """What every rank's runner has, whatever runs its partitions.

    Args:
        link: this rank's exchanges.
        plan: arranges the ranks.

    Attributes:
        before_send: called before hidden states go to the next stage.
    """

    def __init__(self, link: Collectives, plan: ShardPlan) -> None:
        self.link, self.plan = link, plan
        self.before_send: Callable[[], None] = _nothing

    def receive_hidden(self, hidden: Values) -> None:
        """Take what the same place of the stage before sends."""
        self.link.receive(hidden, self.link.rank - self.plan.width)

    def send_hidden(self, hidden: Values) -> None:
        """Hand on to the same place of the next stage."""
        self.before_send()
        self.link.send(hidden, self.link.rank + self.plan.width)

    @property
    def returns_logits(self) -> bool:
        """Whether this is the first rank of the last stage, and rank 0 is of another stage."""
        return self.plan.pipeline > 1 and self.link.rank == self.plan.world - self.plan.width

    def return_logits(self, logits: Array) -> None:
        """To rank 0."""
        self.link.send(logits, 0)

    def collect(self, logits: Array) -> None:
        """On rank 0 of a pipeline: take the logits of the oldest call whose logits were not taken."""
        self.link.receive(logits, self.plan.world - self.plan.width)


class Shard(NamedTuple):
    """One rank's part of the decoder.

    Attributes:
        runner: it behind the interface of the whole. Logits that it returns are filled on the ranks of the last stage;
            the first of them sends them to rank 0, which takes them by ``Stage.collect`` when it needs them.
        stage: its exchanges with the other ranks.
    """

    runner: Runner
    stage: Stage


def plan_of(bundle: Bundle) -> ShardPlan:
    """How a sharded bundle is split."""
    assert bundle.manifest.shards is not None, "a whole bundle has no ranks"
    return bundle.manifest.shards.plan


def stage_texts(plan: ShardPlan, text: TextConfig) -> list[TextConfig]:
    """What each stage holds of a decoder."""
    return [plan.local_text(text, stage * plan.width) for stage in range(plan.pipeline)]


def _nothing() -> None:
    """Before sending: on a rank that collects no logits there is nothing to do."""
