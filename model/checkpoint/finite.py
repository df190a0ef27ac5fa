"""Numbers that can be computed with: no NaN and no infinity goes by in silence, and no scale that is none.

One NaN in a norm makes every answer of a model the same token. It is told where the number is read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import HerdError

SMALLEST_AMAX, LARGEST_AMAX = 2.0**-48, 2.0**64
"""What the largest magnitude of an input can be: calibration counts less as zero, and the square of more, which a norm
needs, is infinite in float32."""


def require_finite(x: Tensor, what: str, *, first: int = 0) -> None:
    """Refuse values that are not finite; makes no copy of x.

    Args:
        x: any shape.
        what: x is, for the message.
        first: place of x's first entry along the first axis of what it was cut from, for the message.

    Raises:
        HerdError: says what holds them, and where.
    """
    if not is_finite(x):
        kind = "a NaN" if x.isnan().any() else "an infinity"
        index = (~torch.isfinite(x)).nonzero()[0].tolist()
        place = f" at {[index[0] + first, *index[1:]]}" if index else ""
        raise HerdError(f"{what} holds {kind}{place}: the checkpoint is damaged, or its weights overflow")


def is_finite(x: Tensor) -> bool:
    """Whether all values are; makes no copy of x."""
    return not x.numel() or bool(torch.isfinite(torch.stack(x.aminmax())).all())


def require_scales(scales: Tensor, what: str) -> None:
    """Refuse what cannot be the scales of stored codes: they are positive numbers that float32 holds in full precision.

    Raises:
        HerdError: says which scale is none.
    """
    require_within(scales, what, torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max)


def require_magnitudes(amax: Tensor, what: str) -> None:
    """Refuse what cannot be the largest magnitudes of inputs.

    Raises:
        HerdError: says which magnitude is none.
    """
    require_within(amax, what, SMALLEST_AMAX, LARGEST_AMAX)


def require_within(values: Tensor, what: str, least: float, most: float) -> None:
    """Refuse values outside of a range, NaN among them.

    Raises:
        HerdError: says which value it is.
    """
    inside = (values >= least) & (values <= most)
    if not inside.all():
        wrong = float(values[~inside].flatten()[0])
        raise HerdError(f"{what} is {wrong:g}, it must be within {least:.3g} and {most:.3g}: the file is damaged, or "
                        "another program wrote nonsense")
