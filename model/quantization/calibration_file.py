"""Reads a calibration: what ``calibration/`` measured of the inputs of weights, by the canonical names of the weights.

A calibration is a directory:

=====================  =================================================================================
file                   content
=====================  =================================================================================
calibration.json       versions, fingerprint of the checkpoint, hash of the data, observer, parts that
                       stay in high precision, and the statistics of the report
scales.safetensors     ``<observer>/<weight>``: largest magnitude to represent of the input that a weight
                       meets, float32 scalar, or [E] for experts; ``<observer>/<attention>.kv_amax``: [2], and
                       ``.rotated_value_amax``, of values in the basis of rotated recipes;
                       ``input_energy/<weight>`` [K]: the mean square of each channel of that input;
                       ``residual_share/<sublayer>``: how much of the residual stream's energy after a
                       sublayer (``layers.1.self_attn``) is what it added, 1 at most, mean over tokens
hessians/<layer>       Hessians XᵀX of inputs X by weight, [K, K], or [E, K, K] for experts, of one weight
                       of those that read X; X without the weight of the norm before (``hessian_basis.py``)
=====================  =================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import HerdError
from ...reading import read_json
from ..checkpoint import Checkpoint
from ..checkpoint.finite import require_finite
from ..checkpoint.reader import TensorReader
from ..checkpoint.rotated import RotatedCheckpoint
from ..checkpoint.tensors.header import read_header
from ..config.parameter_counts import model_size
from .hessian_basis import input_hessian
from .observers import OBSERVERS
from .outliers import outlier_channels
from .recipes import Recipe, hessian_name

DESCRIPTION = "calibration.json"
SCALES = "scales.safetensors"
HESSIANS = "hessians"
FORMAT = 4
KV_AMAX, ROTATED_VALUE_AMAX = "kv_amax", "rotated_value_amax"
INPUT_ENERGY, RESIDUAL_SHARE = "input_energy", "residual_share"

_ADVICE = "write it again with `herdgraph calibrate`"


@dataclass(frozen=True)
class CalibrationFile:
    """An opened calibration; tensors are read one by one, when asked.

    Attributes:
        path: the directory.
        description: content of ``calibration.json``.
        observer: whose largest magnitudes are used.
        source: the checkpoint in the basis whose Hessians are asked for, None for Hessians as they are stored.
    """

    path: Path
    description: dict[str, Any]
    observer: str
    source: TensorReader | None = field(default=None, kw_only=True)

    @classmethod
    def open(cls, path: Path, fingerprint: str, *, observer: str | None = None) -> CalibrationFile:
        """Open a calibration and check that it was measured on a checkpoint.

        Args:
            path: the directory.
            fingerprint: of the checkpoint.
            observer: one of ``OBSERVERS``, None for the one that calibration chose.

        Raises:
            HerdError: not a calibration, another format's or another checkpoint's, or an observer that it has not.
        """
        if not (path / DESCRIPTION).is_file():
            raise HerdError(f"{path} has no {DESCRIPTION}, it is not a calibration: write one with `herdgraph "
                            "calibrate`")
        description = read_json(path / DESCRIPTION)
        if description.get("format") != FORMAT:
            raise HerdError(f"the calibration format of {path} is {description.get('format')!r}, this herdgraph reads "
                            f"{FORMAT}: {_ADVICE}")
        if (found := description.get("fingerprint")) != fingerprint:
            raise HerdError(f"{path} was measured on another checkpoint (its fingerprint is {str(found)[:12]}…, this "
                            f"one's {fingerprint[:12]}…): {_ADVICE}")
        _check_description(path, description)
        chosen = str(description.get("observer"))
        if observer not in (None, chosen, *OBSERVERS):
            raise HerdError(f"{path} knows no observer {observer!r}: choose one of {', '.join(OBSERVERS)}")
        return cls(path, description, observer or chosen)

    def _read(self, file: str, name: str, index: int | None = None) -> Tensor | None:
        if not (self.path / file).exists():
            return None
        found = read_header(self.path / file).get(name)
        return None if found is None else found.read(index).to(torch.float32)

    @property
    def high_precision_parts(self) -> list[str]:
        """Parts of the model that FP8 recipes must leave in floating point, as a recipe's rules call them."""
        return list(self.description.get("high_precision_parts", []))

    def applied_to(self, recipe: Recipe) -> Recipe:
        """A recipe with those parts in floating point: they were chosen for FP8, other recipes stay as they are."""
        return recipe.with_high_precision(self.high_precision_parts) if recipe.fp8 else recipe

    @property
    def has_hessians(self) -> bool:
        """Whether weights can be rounded by what it measured."""
        return any(self.path.glob(f"{HESSIANS}/*.safetensors"))

    def kv_amax(self, layer: int, *, observer: str | None = None) -> tuple[float, float] | None:
        """Largest magnitudes of a layer's keys and values as they enter the cache; None when not measured."""
        attention = f"{observer or self.observer}/layers.{layer}.self_attn"
        found = self._read(SCALES, f"{attention}.{KV_AMAX}")
        if found is None or not isinstance(self.source, RotatedCheckpoint):
            return None if found is None else (float(found[0]), float(found[1]))
        value = self._read(SCALES, f"{attention}.{ROTATED_VALUE_AMAX}")
        return None if value is None else (float(found[0]), float(value))

    def required_kv_amax(self, layer: int, *, observer: str | None = None) -> tuple[float, float]:
        """Largest magnitudes of a layer's keys and values.

        Raises:
            HerdError: they were not measured.
        """
        if (found := self.kv_amax(layer, observer=observer)) is None:
            raise HerdError(f"{self.path} has no magnitudes of keys and values: {_ADVICE}")
        return found

    def input_amax(self, name: str) -> Tensor:
        """Largest magnitude to represent of the input that a weight meets: a scalar, or [E] for all experts of a layer.

        Args:
            name: canonical name of the weight.

        Raises:
            HerdError: it was not measured.
        """
        found = self._read(SCALES, f"{self.observer}/{name}")
        if found is None:
            raise HerdError(f"{self.path} says nothing of {name} by observer {self.observer!r}: {_ADVICE}")
        return found

    def outliers(self, name: str) -> Tensor | None:
        """The outlier channels [J] of the input that a weight meets (``outliers.py``); None when not measured."""
        return outlier_channels(self._energy(name))

    def residual_share(self, sublayer: str) -> float:
        """How much of the residual stream's energy after a sublayer is what the sublayer added.

        Args:
            sublayer: an attention or a feed-forward, ``layers.1.self_attn``.

        Raises:
            HerdError: it was not measured.
        """
        found = self._read(SCALES, f"{RESIDUAL_SHARE}/{sublayer}")
        if found is None:
            raise HerdError(f"{self.path} does not say what {sublayer} adds to the residual stream: {_ADVICE}")
        return float(found)

    def _energy(self, name: str) -> Tensor | None:
        return self._read(SCALES, f"{INPUT_ENERGY}/{name}")

    def knows_hessian(self, name: str) -> bool:
        """Whether it has the Hessian of a weight's input, by the weight's canonical name; reads no more than names."""
        stored = hessian_name(name)
        path = self.path / _hessians_file(stored)
        return path.exists() and stored in read_header(path)

    def hessian(self, name: str, expert: int | None = None) -> Tensor | None:
        """The Hessian XᵀX of the input X that a weight meets, in the basis of ``source``; None when not measured.

        Args:
            name: canonical name of the weight.
            expert: one of the experts, None for a weight that has none, or for all of them.

        Returns:
            [K, K], or [E, K, K] for all experts.

        Raises:
            HerdError: it is no sum of squares.
        """
        stored = hessian_name(name)
        found = self._read(_hessians_file(stored), stored, expert)
        if found is not None:
            what = f"the Hessian of {name} in {self.path}"
            require_finite(found, what)
            if (found.diagonal(dim1=-2, dim2=-1) < 0).any():
                raise HerdError(f"{what} has a negative diagonal, which no sum of squares has: {_ADVICE}")
        return found if found is None or self.source is None else input_hessian(self.source, name, found)


def _hessians_file(name: str) -> str:
    """Where the Hessians of a weight's layer lie."""
    return f"{HESSIANS}/{'.'.join(name.split('.')[:2])}.safetensors"


def _check_description(path: Path, description: dict[str, Any]) -> None:
    """What a build uses of ``calibration.json``."""
    parts = description.get("high_precision_parts", [])
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise HerdError(f"high_precision_parts of {path / DESCRIPTION} is {str(parts)[:60]}, a list of parts of the "
                        f"model is needed: {_ADVICE}")
    if not isinstance(description.get("observer"), str):
        raise HerdError(f"observer of {path / DESCRIPTION} is {str(description.get('observer'))[:60]}, the name of one "
                        f"is needed: {_ADVICE}")


def identity(checkpoint: Checkpoint) -> dict[str, Any]:
    """What ``calibration.json`` says of its checkpoint: fingerprint, directory with the one it lies in, parameters."""
    return {
        "fingerprint": checkpoint.fingerprint(), "checkpoint": "/".join(checkpoint.directory.absolute().parts[-2:]),
        "parameters": model_size(checkpoint.config).total,
    }


def description_without_data(
    checkpoint: Checkpoint, observer: str, amaxes: Mapping[str, Tensor], high_precision_parts: Sequence[str]
) -> dict[str, Any]:
    """The content of ``calibration.json`` for magnitudes that were not measured here, but stored or trained.

    Args:
        checkpoint: whose weights meet the inputs.
        observer: names where the magnitudes come from.
        amaxes: largest magnitudes of inputs by weight.
        high_precision_parts: parts that stay in floating point, as a recipe's rules call them.
    """
    return {
        "format": FORMAT, **identity(checkpoint),
        "observer": observer, "hessians": False, "high_precision_parts": list(high_precision_parts),
        "versions": {name: metadata.version(name) for name in ("herdgraph", "torch")},
        "data": {"sha256": "", "tokens": 0, "windows": 0, "held_out_windows": 0, "tiles": 0},
        "coverage": {"min_tokens_shown": 0, "own": {}, "shown": {}, "dead": []}, "quality": None,
        "inputs": {name: {"rows": [0], "amax": {observer: amax.reshape(-1).tolist()}, "clipped": {}}
                   for name, amax in amaxes.items()},
    }
