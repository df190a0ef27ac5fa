"""The search for the shard plan that serves a model best on a fleet: every valid plan, with replicas side by side.

A plan of fewer ranks than there are devices is replicated, and the replicas share the batch. The best plan fits, then
decodes fastest at the batch, then has the fewest collectives, then the fewest ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ...errors import HerdError
from ...files import size
from ...model.config import HerdConfig
from ...model.config.shard_plan import ShardPlan
from .devices import Device, Fleet, parse_fleet
from .memory import RESERVE, Workload, fullest_rank
from .roofline import Rate, decode_rate
from .storage import Storage
from .traffic import collectives_per_token

_LONGEST = 131_072
"""Tokens of context that a plan is chosen for when none are given, or the model's limit if that is less."""


@dataclass(frozen=True)
class ServingSpec:
    """A model to be served.

    Attributes:
        config: the model.
        storage: of weights and caches.
        workload: all sequences, and their length.
    """

    config: HerdConfig
    storage: Storage
    workload: Workload

    def __post_init__(self) -> None:
        context, most = self.workload.context, self.config.text.max_position_embeddings
        if context < 1 or self.workload.batch < 1:
            raise HerdError(f"context is {context} and batch {self.workload.batch}, both must be at least 1")
        if context > most:
            raise HerdError(f"a context of {context} tokens is beyond the model's {most}: ask for at most that")

    def shared_by(self, replicas: int) -> Workload:
        """The workload of the busiest replica, when the batch is spread over some replicas."""
        return replace(self.workload, batch=-(-self.workload.batch // replicas))


@dataclass(frozen=True)
class Candidate:
    """A shard plan, weighed on a fleet.

    Attributes:
        plan: how one replica is split.
        replicas: how many run side by side.
        parts: bytes of the fullest device by part of the model.
        usable: bytes of a device that may be planned with.
        decode: predicted rate of decoding the batch; without known rates, good for comparing plans only.
        collectives: exchanges that a token waits for.
    """

    plan: ShardPlan
    replicas: int
    parts: dict[str, float]
    usable: float
    decode: Rate
    collectives: int

    @property
    def used(self) -> float:
        """Bytes of the fullest device."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether every device has room for its part."""
        return self.used <= self.usable

    @property
    def rank(self) -> tuple[bool, float, int, int]:
        """Sort key, the best first: plans that fit by their decode rate, the others by the memory that they need."""
        worth = -self.decode.tokens_per_second if self.fits else self.used
        return not self.fits, worth, self.collectives, self.plan.world


def valid_plans(config: HerdConfig, most: int) -> Iterator[ShardPlan]:
    """Every plan that the model can be split by, of at most ``most`` ranks."""
    text = config.text
    for width in range(1, min(most, text.num_heads) + 1):
        for expert in range(1, width + 1):
            if width % expert or not ShardPlan(width // expert, expert).fits(text):
                continue
            for pipeline in range(1, min(most // width, text.num_layers) + 1):
                yield ShardPlan(width // expert, expert, pipeline)


def usable(device: Device) -> float:
    """Bytes of a device that may be planned with."""
    return device.memory * (1 - RESERVE)


def candidates(spec: ServingSpec, fleet: Fleet) -> list[Candidate]:
    """All plans for a fleet, each with as many replicas as there are devices for, the best first."""
    found = []
    for plan in valid_plans(spec.config, fleet.count):
        replicas = min(fleet.count // plan.world, spec.workload.batch)
        found.append(Candidate(
            plan, replicas, fullest_rank(spec.config, plan, spec.storage, spec.shared_by(replicas)),
            usable(fleet.device), decode_rate(spec.config, plan, spec.storage, fleet, spec.workload, replicas),
            collectives_per_token(spec.config.text, plan),
        ))
    return sorted(found, key=lambda candidate: candidate.rank)


def least_devices(spec: ServingSpec, device: Device) -> tuple[int, ShardPlan, int] | None:
    """The fewest devices that can serve a model.

    Returns:
        Number of devices, the plan of a replica, and replicas; None when no number of devices is enough.
    """
    best: tuple[int, ShardPlan, int] | None = None
    for plan in sorted(valid_plans(spec.config, spec.config.text.num_heads * spec.config.text.num_layers),
                       key=lambda plan: plan.world):
        if best and plan.world >= best[0]:
            break
        most = spec.workload.batch if best is None else min(spec.workload.batch, (best[0] - 1) // plan.world)
        if replicas := _least_replicas(spec, device, plan, most):
            best = plan.world * replicas, plan, replicas
    return best


def _least_replicas(spec: ServingSpec, device: Device, plan: ShardPlan, most: int) -> int:
    """The fewest replicas of a plan that fit, 0 when ``most`` are too few."""

    def fits(replicas: int) -> bool:
        parts = fullest_rank(spec.config, plan, spec.storage, spec.shared_by(replicas))
        return sum(parts.values()) <= usable(device)

    if not fits(most):
        return 0
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return low


def best_of(found: list[Candidate], spec: ServingSpec, fleet: Fleet) -> Candidate:
    """The first of the candidates.

    Raises:
        HerdError: none of them fits; says how many devices it would take.
    """
    best = found[0]
    if best.fits:
        return best
    least = least_devices(spec, fleet.device)
    more = f"it would take {least[0]} of them ({least[1]}" if least else "no number of them would do"
    more += f", {least[2]} replicas)" if least and least[2] > 1 else ")" if least else ""
    raise HerdError(
        f"nothing fits {fleet}: the best plan ({best.plan}) needs {size(best.used)} on a device that has "
        f"{size(best.usable)} to plan with; {more}; or ask for a smaller batch, context, recipe or --kv"
    )


def choose(
    config: HerdConfig, recipe: str, devices: str | Fleet, *, context: int | None = None, batch: int = 1,
    kv: str | None = None,
) -> ShardPlan:
    """The shard plan that serves a model best on a fleet; ``build.py --shards auto`` takes it.

    Args:
        config: the model.
        recipe: of the weights, by name.
        devices: ``8xH100`` or ``8x80GB``.
        context: tokens of a sequence; None for the model's, at most 131072.
        batch: sequences at once.
        kv: type of keys and values; None for the one that the target computes in.

    Raises:
        HerdError: nothing fits, or an impossible number or name.
    """
    fleet = parse_fleet(devices) if isinstance(devices, str) else devices
    longest = min(_LONGEST, config.text.max_position_embeddings)
    workload = Workload(longest if context is None else context, batch)
    spec = ServingSpec(config, Storage.on(recipe, kv, cpu=fleet.device.name == "cpu"), workload)
    return best_of(candidates(spec, fleet), spec, fleet).plan
