"""Which parts of a model keep 8 bits where the rest gets 4, so that a bundle of a given size loses least.

A part is what an operator stores alike. What a format does to it is found by rounding a sample of its output channels
(``rounding_sample.py``).

Products in a row add their relative errors up, and what the logits lose grows with the sum: SENSITIVITY nats, were
every product of the model all error. Attention and feed-forwards count alike: three products in a row, where q and k,
which only weigh values, count half. What the head does wrong is in the logits as it is: half its variance over the
tokens that are likely, a third of its mean square.

So everything starts in 4 bits, and whatever the size leaves goes where a byte takes most of the loss away.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from ..errors import HerdError
from ..model.config import HerdConfig
from ..model.config.names import Shape, expected_tensors
from ..model.config.parameter_counts import model_size
from ..model.config.shard_plan import ShardPlan
from ..model.quantization.calibration_file import CalibrationFile
from ..model.quantization.formats import BlockFormat
from ..model.quantization.recipes import RECIPES, Recipe, Rule
from .memory_plan import bytes_of_ranks
from .rounding_sample import RoundingSampler
from .targets.target import Target

SENSITIVITY = 20.0
"""Measured on SmolLM2 in FP8, whose products all have the same relative error: KL 2.8e-2 for errors of 1.4e-3."""
LOGIT_LOSS = 0.33
"""Nats by mean square of what is added to the logits: measured on SmolLM2 in 4 bits."""
_WEIGHTS = {"q_proj": 0.5, "k_proj": 0.5, "gate_up_proj": 2.0}
"""How much the error of a matrix counts, 1 for all others; gate and up of experts are one matrix."""
_PER_LAYER = 9.0
"""The sum of all weights in a layer with attention, a shared expert and routed ones."""


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
        saved: nats of KL that go away, as far as can be told beforehand.
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
    found: dict[str, int] = {}
    for part in parts:
        layout = recipe.layout_of(*part.tensors)
        found[part.name] = layout.bits if isinstance(layout, BlockFormat) else 8
    return found


def choices(
    parts: list[Part], few: Recipe, many: Recipe, calibration: CalibrationFile,
    stored_bytes: Mapping[str, tuple[float, float]],
) -> Iterator[Choice]:
    """What more bits would bring every part.

    Args:
        parts: of the model.
        few: the recipe with few bits.
        many: the recipe with more.
        calibration: Hessians in the basis of the build.
        stored_bytes: of every weight by the two recipes, by name.
    """
    assert calibration.source is not None, "calibration_for gives every build its source"
    layer = SENSITIVITY / (_PER_LAYER * calibration.source.config.text.num_layers)
    for part in parts:
        sampler = RoundingSampler(calibration, (few.layout_of(*part.tensors), many.layout_of(*part.tensors)),
                                  rotated=few.rotated)
        saved = 0.0
        for name, shape in part.tensors.items():
            found = sampler.improvement(name, shape)
            role = name.removesuffix(".weight").rsplit(".", 1)[-1]
            saved += (LOGIT_LOSS * found.mean_square if role == "lm_head"
                      else layer * _WEIGHTS.get(role, 1.0) * found.relative_error)
        less, more = (sum(stored_bytes[name][which] for name in part.tensors) for which in (0, 1))
        yield Choice(part, saved, max(more - less, 1.0))


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
    width, packed = target.float_bytes, target.packs_weights
    smallest = with_bits(recipe, few, many, parts, [])
    least = sum(bytes_of_ranks(config, smallest, ShardPlan(), float_bytes=width, packed=packed))
    room = _room(bits, least, model_size(config).total)
    sizes = {name: (few.stored_bytes(name, shape, width, packed=packed),
                    many.stored_bytes(name, shape, width, packed=packed))
             for part in parts for name, shape in part.tensors.items()}
    chosen = allocate(list(choices(parts, few, many, calibration, sizes)), room)
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
