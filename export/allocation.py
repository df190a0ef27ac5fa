"""Which parts of a model keep 8 bits where the rest gets 4, so that a bundle of a given size loses least.

What a format does to a part, the weights that an operator stores alike, is found by rounding a sample of its output
channels to it, as a build does: GPTQ on the Hessians H of the calibration.

    error = tr((W - Q)ᵀ H (W - Q)) / tr(Wᵀ H W)         of the product on the data, relative to what it gives

Relative errors of products add up to what the logits lose, in proportion. So everything starts in 4 bits, and whatever
the size leaves goes where a byte takes most of the error away.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ..errors import HerdError
from ..model.checkpoint.reader import TensorReader
from ..model.checkpoint.rotated import power_of_two_in
from ..model.config import HerdConfig
from ..model.config.names import Shape, expected_tensors
from ..model.config.parameter_counts import model_size
from ..model.config.shard_plan import ShardPlan
from ..model.quantization.calibration_file import CalibrationFile
from ..model.quantization.formats import BlockFormat, ChannelFormat, Format
from ..model.quantization.recipes import RECIPES, Recipe, Rule
from .memory_plan import bytes_of_ranks
from .passes.quantize._hessians import hessian_of
from .passes.quantize.rotate_hidden import LARGEST_BLOCK, SMALLEST_BLOCK, BlockRotated
from .targets.target import Target
from .weights.block import BlockRounder, filled_up, inverse_cholesky_of
from .weights.channel import ChannelCodes
from .weights.stream import Weight, channels_of

CHANNELS = 64
"""Output channels of a matrix that speak for all of them."""
EXPERTS = 2
"""Experts of a layer that speak for all of them."""


@dataclass(frozen=True)
class Part:
    """Weights that are stored in one format.

    Attributes:
        name: of the part, as a recipe's rules call it; of several side by side the first.
        names: of all parts that the rules have to name.
        tensors: shapes of its weights by canonical name.
    """

    name: str
    names: tuple[str, ...]
    tensors: dict[str, Shape]


def parts_of(config: HerdConfig) -> list[Part]:
    """The parts of a decoder whose bits can be chosen: per layer q, k and v; o; feed-forwards; and the head."""
    grouped: dict[tuple[str, ...], dict[str, Shape]] = {}
    for name, shape in expected_tensors(config).items():
        if len(shape) > 1 and (names := _part_names(name)):
            grouped.setdefault(names, {})[name] = shape
    return [Part(names[0], names, tensors) for names, tensors in grouped.items()]


def _part_names(name: str) -> tuple[str, ...]:
    """The parts that share the format of a weight; none where it has no choice."""
    owner, _, role = name.removesuffix(".weight").rpartition(".")
    if role == "lm_head":
        return (role,)
    if not name.startswith("layers.") or role == "router":
        return ()
    if role in ("q_proj", "k_proj", "v_proj"):
        return tuple(f"{owner}.{each}" for each in ("q_proj", "k_proj", "v_proj"))
    if role == "o_proj":
        return (f"{owner}.{role}",)
    return (owner,)


@dataclass(frozen=True)
class Choice:
    """What 8 bits instead of 4 would bring a part.

    Attributes:
        part: of the model.
        saved: relative error that goes away.
        cost: bytes.
    """

    part: Part
    saved: float
    cost: float


def allocate(choices: list[Choice], room: float) -> list[Part]:
    """The parts that get 8 bits, with the most saved per byte first, as long as there is room for them."""
    chosen = []
    for choice in sorted(choices, key=lambda choice: choice.saved / choice.cost, reverse=True):
        if choice.cost <= room:
            room -= choice.cost
            chosen.append(choice.part)
    return chosen


def with_bits(recipe: Recipe, few: Recipe, many: Recipe, parts: list[Part], chosen: list[Part]) -> Recipe:
    """The recipe with rules for every part, by one recipe for those that are chosen, by another for the rest.

    Args:
        recipe: what else is said of weights.
        few: few bits.
        many: more bits.
        parts: all that have a choice.
        chosen: those that get more.
    """
    names = {part.name for part in chosen}
    rules = [Rule(name, (many if part.name in names else few).layout_of(*part.tensors))
             for part in parts for name in part.names]
    return replace(recipe, rules=(*rules, *recipe.rules))


def bits_of(recipe: Recipe, parts: list[Part]) -> dict[str, int]:
    """Bits of the weights of every part, for people and the manifest."""
    found = {}
    for part in parts:
        layout = recipe.layout_of(*part.tensors)
        found[part.name] = layout.bits if isinstance(layout, BlockFormat) else 8
    return found


def choices(
    source: TensorReader, parts: list[Part], few: Recipe, many: Recipe, calibration: CalibrationFile,
    stored_bytes: Mapping[str, tuple[float, float]],
) -> Iterator[Choice]:
    """What more bits would bring every part.

    Args:
        source: the checkpoint in the basis of the build.
        parts: of the model.
        few: the recipe with few bits.
        many: the recipe with more.
        calibration: Hessians.
        stored_bytes: of every weight by the two recipes, by name.
    """
    for part in parts:
        layouts = few.layout_of(*part.tensors), many.layout_of(*part.tensors)
        less, more = (sum(stored_bytes[name][which] for name in part.tensors) for which in (0, 1))
        errors = [_errors(source, name, shape, layouts, calibration, rotated=few.rotated)
                  for name, shape in part.tensors.items()]
        yield Choice(part, sum(worse - better for worse, better in errors) * _share(part), max(more - less, 1.0))


def _share(part: Part) -> float:
    """Parts with several weights side by side read one input and are one product."""
    return 1 / len(part.names)


def _errors(
    source: TensorReader, name: str, shape: Shape, layouts: tuple[Format | None, ...], calibration: CalibrationFile, *,
    rotated: bool,
) -> tuple[float, float]:
    """Relative errors of a weight in two formats, the mean over some of its experts."""
    if len(shape) == 2:
        weights = [Weight(source, name, shape).transposed()]
    else:
        weights = [Weight(source, name, shape[1:], expert=expert) for expert in range(min(EXPERTS, shape[0]))]
    found = [_errors_of(_as_built(weight, rotated=rotated), layouts, calibration) for weight in weights]
    return sum(few for few, _ in found) / len(found), sum(many for _, many in found) / len(found)


def _as_built(weight: Weight, *, rotated: bool) -> ir.TensorProtocol:
    block = power_of_two_in(int(weight.shape.numpy()[0]), LARGEST_BLOCK)
    spread = rotated and "down_proj" in weight.stored and block >= SMALLEST_BLOCK
    return BlockRotated(weight, block) if spread else weight


def _errors_of(
    weight: ir.TensorProtocol, layouts: tuple[Format | None, ...], calibration: CalibrationFile
) -> tuple[float, float]:
    fewest = next(layout for layout in layouts if isinstance(layout, BlockFormat))
    hessian_KK = hessian_of(weight, fewest, calibration)
    assert hessian_KK is not None, "hessian_of refuses a calibration without it"
    rows_NK = _sample(weight)
    energy = _energy(rows_NK, hessian_KK)
    errors = [_energy(_rounded(weight, rows_NK, layout, hessian_KK) - rows_NK, hessian_KK) for layout in layouts]
    return errors[0] / energy, errors[1] / energy


def _sample(weight: ir.TensorProtocol) -> np.ndarray:
    """Output channels spread over the whole matrix, [n, K]."""
    step = max(1, int(weight.shape.numpy()[1]) // CHANNELS)
    rows, first = [], 0
    for some_NK in channels_of(weight):
        rows.append(some_NK[-first % step :: step])
        first += len(some_NK)
    return np.concatenate(rows)


def _rounded(weight: ir.TensorProtocol, rows_NK: np.ndarray, layout: Format | None, hessian_KK: Tensor) -> np.ndarray:
    """Values of output channels after rounding."""
    if isinstance(layout, ChannelFormat):
        codes = ChannelCodes(ir.Tensor(np.ascontiguousarray(rows_NK.T)), centered=layout.centered)
        values = [rows.astype(np.float32) - 128 for rows in codes.channels()]
        return np.concatenate(values) * codes.scales()[:, None]
    assert isinstance(layout, BlockFormat)
    padded = filled_up(rows_NK, layout.block)
    factor_KK = inverse_cholesky_of(weight, hessian_KK, padded.shape[1])
    return BlockRounder(layout).quantize(padded, factor_KK).values().reshape(padded.shape)[:, : rows_NK.shape[1]]


def _energy(rows_NK: np.ndarray, hessian_KK: Tensor) -> float:
    """What rows give on the data: tr(R H Rᵀ)."""
    rows = torch.from_numpy(rows_NK)
    return max(float(((rows @ hessian_KK) * rows).sum(dtype=torch.float64)), 1e-30)


def allocated(
    config: HerdConfig, target: Target, recipe: Recipe, calibration: CalibrationFile | None, bits: float
) -> tuple[Recipe, dict[str, int]]:
    """A recipe whose bundle has a given size, and the bits of every part.

    Args:
        config: the model.
        target: the lowering.
        recipe: int4, as the target stores it.
        calibration: Hessians.
        bits: per parameter, of the whole bundle.

    Raises:
        HerdError: another recipe, no calibration, or fewer bits than everything in 4 bits has.
    """
    if recipe.name != "int4":
        raise HerdError(f"--bits chooses between 4 and 8 bits and goes with --recipe int4, not with {recipe.name}")
    if calibration is None or calibration.source is None:
        raise HerdError("--bits chooses by what rounding does to data: pass --calibration DIRECTORY, written by "
                        "`herdgraph calibrate`")
    few = target.stored(replace(RECIPES["int4"], rules=tuple(
        rule for rule in RECIPES["int4"].rules if rule.part not in ("lm_head", "self_attn"))))
    many, parts = target.stored(RECIPES["int8"]), parts_of(calibration.source.config)
    stored = {"float_bytes": target.float_bytes, "packed": target.packs_weights}
    least = sum(bytes_of_ranks(config, with_bits(recipe, few, many, parts, []), ShardPlan(), **stored))
    room = _room(bits, least, model_size(config).total)
    sizes = {name: (few.stored_bytes(name, shape, **stored), many.stored_bytes(name, shape, **stored))
             for part in parts for name, shape in part.tensors.items()}
    chosen = allocate(list(choices(calibration.source, parts, few, many, calibration, sizes)), room)
    found = with_bits(recipe, few, many, parts, chosen)
    return found, bits_of(found, parts)


def _room(bits: float, least: float, parameters: int) -> float:
    """Bytes that a target leaves beyond everything in 4 bits."""
    room = bits * parameters / 8 - least
    if room < 0:
        raise HerdError(f"--bits {bits:g} cannot be met: with everything in 4 bits this model has "
                        f"{math.ceil(800 * least / parameters) / 100:.2f} bits per weight, norms, router and embedding "
                        "included; ask for as many, or leave the option away")
    return room
