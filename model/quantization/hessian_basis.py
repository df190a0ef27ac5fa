"""A Hessian in the basis that a build computes in.

A product behind a norm reads x = n diag(g), for what the norm gives before its weight g; with g folded into the weights
and the residual stream rotated (``model/checkpoint/rotated.py``) it reads x = n R. Sums over all tokens follow:

    H = diag(g) N diag(g)        H = R^T N R        N = sum n^T n

A calibration stores N: where g is 0 the second could not be found from the first. What the output projection reads is
turned head by head with the values. Hidden values are the same in both bases. Experts' inputs carry a score, a factor
of the whole row.
"""

from __future__ import annotations

from torch import Tensor

from ..checkpoint.reader import TensorReader
from ..checkpoint.rotated import RotatedCheckpoint
from ..config.names import norm_before


def input_hessian(source: TensorReader, name: str, stored_KK: Tensor) -> Tensor:
    """The Hessian of a weight's input from the one that is stored: [..., K, K].

    Args:
        source: the checkpoint in the basis of the build.
        name: canonical name of the weight.
        stored_KK: of a calibration.
    """
    rotated = source if isinstance(source, RotatedCheckpoint) else None
    if rotated and name.endswith("o_proj.weight"):
        return rotated.rotate_heads(rotated.rotate_heads(stored_KK).mT)
    if (norm := norm_before(name)) is None:
        return stored_KK
    if rotated:
        return rotated.rotate(rotated.rotate(stored_KK).mT)
    gain_K = source.read(norm).float()
    return gain_K[:, None] * stored_KK * gain_K
