"""The report of ``herdgraph plan``: the chosen shard plan, the reason, the alternatives, and other contexts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .devices import Fleet
from .memory import Workload, weight_total
from .roofline import Rate, prefill_rate
from .search import Candidate, ServingSpec, best_of, candidates, least_devices
from .traffic import cache_bytes

CONTEXTS = (128 << 10, 1 << 20, 10 << 20)


@dataclass(frozen=True)
class ContextRow:
    """Memory and devices that sequences of one length need.

    Attributes:
        context: tokens of a sequence.
        cache_bytes: keys and values of one sequence.
        devices: fewest of the fleet's devices for one sequence; 0 when no number is enough.
        batch_devices: fewest for the whole batch.
    """

    context: int
    cache_bytes: float
    devices: int
    batch_devices: int


@dataclass(frozen=True)
class PlanReport:
    """The chosen plan, the plans that it was chosen from, and the reason.

    Attributes:
        spec: what is to be served.
        fleet: the devices.
        best: the chosen plan.
        others: all plans, the chosen one among them, the best first.
        prefill: predicted rate of a prompt that fills the context, on the chosen plan.
        weight_bytes: bytes of the weights of the whole model.
        contexts: what sequences of other lengths would need.
    """

    spec: ServingSpec
    fleet: Fleet
    best: Candidate
    others: tuple[Candidate, ...]
    prefill: Rate
    weight_bytes: float
    contexts: tuple[ContextRow, ...]

    @property
    def why(self) -> str:
        """The reason for the choice in one line."""
        fitting = [candidate for candidate in self.others if candidate.fits]
        if len(fitting) == 1:
            return f"the only one of {len(self.others)} plans that fits"
        about = f"of the {len(fitting)} plans that fit (of {len(self.others)})"
        if not self.fleet.device.rated:
            return f"reads the fewest bytes per token on its busiest device {about}"
        second = fitting[1]
        return (f"decodes fastest {about}: {rate(self.best.decode.tokens_per_second)} tokens/s, the next is "
                f"{second.plan} with {rate(second.decode.tokens_per_second)}")

    @property
    def notes(self) -> list[str]:
        """Assumptions behind the numbers, and what they leave out, a line each."""
        device, storage = self.fleet.device, self.spec.storage
        found = [storage.note] if storage.note else []
        if not device.rated:
            return [*found, "only the memory of these devices is known: no throughput is predicted"]
        if storage.recipe == "fp8" and not storage.on_cpu and device.computes("fp8") != "fp8":
            found.append(f"{device.name} has no FP8 products: weights are read in FP8 and multiplied in 16 bits")
        reached = device.efficiency
        how = "measured on another model" if device.name == "cpu" else "assumed, not measured"
        found.append(
            f"estimates: weights are read at {reached.weights:.0%} of the bandwidth, caches at {reached.caches:.0%}; "
            f"{reached.compute:.0%} of the arithmetic and {reached.link:.0%} of the links are reached ({how}); routing "
            "is even"
        )
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain dictionary; rates that are not known are null."""
        rated = self.fleet.device.rated
        return {
            "devices": {"name": self.fleet.device.name, "count": self.fleet.count,
                        "per_machine": self.fleet.per_machine, "bytes": self.fleet.device.memory,
                        "source": self.fleet.device.source},
            "recipe": self.spec.storage.recipe, "kv": self.spec.storage.kv, **asdict(self.spec.workload),
            "weight_bytes": round(self.weight_bytes), "plan": _row(self.best, rated), "why": self.why,
            "prefill": asdict(self.prefill) if rated else None,
            "candidates": [_row(candidate, rated) for candidate in self.others],
            "contexts": [asdict(row) for row in self.contexts], "notes": self.notes,
        }


def _row(candidate: Candidate, rated: bool) -> dict[str, Any]:
    return {
        **candidate.plan.to_json(), "replicas": candidate.replicas, "fits": candidate.fits,
        "device_bytes": {part: round(count) for part, count in candidate.parts.items()},
        "device_total": round(candidate.used), "device_usable": round(candidate.usable),
        "collectives_per_token": candidate.collectives, "decode": asdict(candidate.decode) if rated else None,
    }


def make_report(spec: ServingSpec, fleet: Fleet) -> PlanReport:
    """Weigh all plans for a fleet and report the best.

    Raises:
        HerdError: no plan fits.
    """
    found = candidates(spec, fleet)
    best = best_of(found, spec, fleet)
    prefill = prefill_rate(spec.config, best.plan, spec.storage, fleet, spec.workload.context, best.replicas)
    return PlanReport(
        spec, fleet, best, tuple(found), prefill, weight_total(spec.config, spec.storage),
        tuple(_context_row(spec, fleet, context) for context in CONTEXTS
              if context <= spec.config.text.max_position_embeddings),
    )


def _context_row(spec: ServingSpec, fleet: Fleet, context: int) -> ContextRow:
    def devices(batch: int) -> int:
        least = least_devices(ServingSpec(spec.config, spec.storage, Workload(context, batch)), fleet.device)
        return least[0] if least else 0

    kept = cache_bytes(spec.config.text, spec.storage, context)
    return ContextRow(context, kept, devices(1), devices(spec.workload.batch))


def tokens(count: int) -> str:
    """A number of tokens for people: 8k, 1M, 1000."""
    for unit, symbol in ((1 << 20, "M"), (1 << 10, "k")):
        if count % unit == 0:
            return f"{count // unit}{symbol}"
    return str(count)


def rate(value: float) -> str:
    """Tokens per second for people."""
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"
