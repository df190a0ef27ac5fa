"""A decoder whose plans serve many layers each: they take a layer's weights as inputs. Not run on hardware.

A plan with weights inside is as large as the weights, and takes as long to build. One whose weights are inputs
(``export/targets/tensorrt/weights_as_inputs.py``) has a few megabytes, and layers of one kind (dense or mixture,
rotating and chunked or global) share it. A *step* is a plan with the weights of one layer:

    ids -> [ embedding, layer 0 ] -> hidden -> [ layer 1 ] -> ... -> hidden -> [ last layer, norm, head ] -> logits

These are the stages of a pipeline of as many stages as layers (``KeepStage``), one after the other on one GPU and one
stream. Hidden states alternate between two places: a plan never writes where it reads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

import numpy as np

from ....errors import HerdError
from ...kv_cache.memory import CacheMemory
from ..device_array import DeviceArray
from .cuda import Allocation
from .device import DeviceExecutor
from .executor import Array, Call, Limits

_LAYER = re.compile(r"layers\.\d+\.")


@dataclass(frozen=True)
class Step:
    """One layer's run of a plan.

    Attributes:
        executor: holds the plan, which other steps may share.
        weights: of the layer, by the plan's names.
        owners: keep their memory alive.
    """

    executor: DeviceExecutor
    weights: Mapping[str, DeviceArray]
    owners: Items[Allocation]

    @classmethod
    def of(cls, executor: DeviceExecutor, layer: int, weights: Mapping[str, Array]) -> Step:
        """Upload a layer's weights for a plan that was built for it, or for another one of its kind.

        Args:
            executor: holds the plan.
            layer: its number.
            weights: by canonical name, such as ``layers.7.feed_forward.router.weight``; types that numpy does not have
                as their bytes.

        Raises:
            HerdError: a weight is missing, or not of the plan's size.
        """
        placed: dict[str, DeviceArray] = {}
        owners = []
        for name in executor.weights:
            own = _LAYER.sub(f"layers.{layer}.", name)
            if own not in weights:
                raise HerdError(f"the plan takes {own}, which is not among the weights of layer {layer}")
            placed[name], owner = executor.keep(name, np.ascontiguousarray(weights[own]))
            owners.append(owner)
        return cls(executor, placed, owners)


class LayerWalk:
    """All layers of a decoder, step by step, as an ``Executor``.

    Args:
        steps: one per layer, in order, on one GPU.
        width: of hidden states.
    """

    def __init__(self, steps: Items[Step], width: int) -> None:
        self.steps, self.width = steps, width
        self._first = steps[0].executor
        self.memory: CacheMemory = self._first.memory
        self.takes_features = self._first.takes_features
        self.profiles = _common([step.executor.profiles for step in steps])
        self._places = [self._first.cuda.allocate(0) for _ in range(2)]

    def run(self, call: Call) -> Array:
        """See ``Executor``."""
        # What layers read of a call is uploaded once for all of them.
        inputs = {name: self._first.put(name, array) for name, array in call.inputs.items()}
        size, hidden, found = call.inputs["input_ids"].shape, dict[str, DeviceArray](), dict[str, DeviceArray]()
        for index, step in enumerate(self.steps):
            layer = replace(call, inputs={}, caches=[call.caches[index]], first_slots=[call.first_slots[index]])
            hidden = self._ends(index, hidden, size)
            found = step.executor.forward(layer, {**inputs, **step.weights, **hidden})
        return self._first.download(found["logits"])

    def close(self) -> None:
        """See ``Executor``."""
        for step in self.steps:
            step.executor.close()

    def _ends(self, index: int, before: Mapping[str, DeviceArray], size: tuple[int, ...]) -> dict[str, DeviceArray]:
        """A step's hidden states: those that the step before made, under the name that this plan has for them, and a
        place for its own.
        """
        executor, ends = self.steps[index].executor, dict[str, DeviceArray]()
        if index:
            ends[executor.receives] = before[self.steps[index - 1].executor.hands_on]
        if name := executor.hands_on:
            wanted = executor.typed(name, (*size, self.width))
            ends[name] = replace(wanted, pointer=self._room(index % 2, wanted.nbytes))
        return ends

    def _room(self, which: int, size: int) -> int:
        """One of the two places, at least so large."""
        if self._places[which].bytes < size:
            self._places[which] = self._first.cuda.allocate(size)
        return self._places[which].pointer


def _common(profiles: Items[Items[Limits]]) -> list[Limits]:
    """Sizes that every plan's profile of the same index takes; each plan knows some of the dimensions."""
    found: list[Limits] = []
    for of_index in zip(*profiles, strict=True):
        names = {name for limits in of_index for name in limits}
        bounds = {name: [limits[name] for limits in of_index if name in limits] for name in sorted(names)}
        found.append({name: (max(low for low, _ in of), min(high for _, high in of)) for name, of in bounds.items()})
    return found
