"""Outlier channels: the few channels of an input that FP8 products leave in floating point.

E4M3 is wrong by a share of each number, so the error of a rounded input is a share of its energy, and much of that is
in few channels (Dettmers et al. 2022, "LLM.int8()"). For the set J of them and the rest R, both of an input x [K] and
of a weight W [K, N],

    x W  =  x_J W_J  +  x_R W_R,       x_J W_J in 16 bits,      x_R W_R in FP8

16 of 5120 channels are 0.6 % of a weight's bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

MOST = 16
"""Outlier channels of an input: as many as a tensor core multiplies at once."""
_SHARE = 8
"""At most one channel in so many is one."""


def outlier_count(inputs: int) -> int:
    """How many of the channels of an input are outlier channels."""
    return min(MOST, inputs // _SHARE)


def outlier_channels(energy_K: Tensor | None) -> Tensor | None:
    """The channels with the largest energies, int64 [J], ascending; None of less than 8, or where nothing is known."""
    count = 0 if energy_K is None else outlier_count(len(energy_K))
    return energy_K.topk(count).indices.sort().values if energy_K is not None and count else None
