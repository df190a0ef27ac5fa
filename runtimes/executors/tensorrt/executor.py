"""What runs a plan, seen from the host: calls of known sizes, caches that stay where they are.

Shapes: B sequences, T new tokens, R rows of logits, P image tokens, G key/value heads, S slots, K head dimension,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ....errors import HerdError
from ...kv_cache.memory import Buffer, CacheMemory

Array = np.ndarray[Any, Any]

Limits = Mapping[str, tuple[int, int]]
"""Smallest and largest size of every dimension (``batch``, ``tokens``, ``slots_global`` ...) in one profile."""


@dataclass(frozen=True)
class Call:
    """One run of a decoder plan.

    Attributes:
        profile: index of the optimisation profile.
        inputs: host arrays by input name: ``input_ids`` [B, T], ``past_lengths`` [B], ``logit_rows`` [R] and, where the
            plan reads them, ``image_features`` [P, width].
        caches: keys and values [B, G, S, K] of all layers.
        first_slots: per layer, the slot of each sequence's first new token. The executor writes the ``new.*`` outputs
            to T slots from there.
    """

    profile: int
    inputs: Mapping[str, Array]
    caches: Items[tuple[Buffer, Buffer]]
    first_slots: Items[Items[int]]


class Executor(Protocol):
    """Holds a loaded plan and the memory that it works in."""

    @property
    def memory(self) -> CacheMemory:
        """Makes cache buffers that ``run`` takes."""

    @property
    def profiles(self) -> Items[Limits]:
        """Sizes of the plan's optimisation profiles, in order."""

    @property
    def takes_features(self) -> bool:
        """Whether the plan reads ``image_features``."""

    def run(self, call: Call) -> Array:
        """Run once and append the new keys and values to the caches; logits float32 [B, R, V]."""

    def close(self) -> None:
        """Run no more."""


def choose_profile(profiles: Items[Limits], sizes: Mapping[str, int]) -> int:
    """The first profile that a call fits.

    Args:
        profiles: of the plan; those for fewer tokens come first.
        sizes: of the call; dimensions that a profile does not know are free.

    Raises:
        HerdError: there is none; names the size that stands in the way.
    """
    for index, limits in enumerate(profiles):
        if all(_fits(limits, name, size) for name, size in sizes.items()):
            return index
    for name, size in sizes.items():
        if not any(_fits(limits, name, size) for limits in profiles):
            low, high = min(limits[name][0] for limits in profiles), max(limits[name][1] for limits in profiles)
            raise HerdError(f"{name} is {size}, the plan was built for {low} to {high}: build it with other limits")
    wanted = ", ".join(f"{name} {size}" for name, size in sizes.items())
    raise HerdError(f"no profile of the plan takes {wanted} together: build it with other limits")


def _fits(limits: Limits, name: str, size: int) -> bool:
    return name not in limits or limits[name][0] <= size <= limits[name][1]
