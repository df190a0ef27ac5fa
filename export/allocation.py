"""How many bits each part of a model gets, so that a bundle of a given size loses least.

A part is what an operator stores alike. What a format does to it is found by rounding a sample of its output channels
(``rounding_sample.py``).

A sublayer adds y to the residual stream h. Products in a row add their relative errors up to that of y, and what the
logits lose grows with what it makes of the stream's:

    loss = SENSITIVITY * relative error of y * mean(|y|^2 / |h + y|^2)

The first and the last layers change most of the stream and lose most. What q and k do wrong changes where attention
looks, whatever its share. What the head does wrong is in the logits as it is: half its variance over the tokens that
are likely, a third of its mean square. A head that is the table of tokens, too, adds what they begin with.

So everything starts with the fewest bits, and whatever the size leaves goes, step by step, where a byte takes most of
the loss away.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..errors import HerdError
from ..model.config import HerdConfig
from ..model.config.names import Shape, expected_tensors
from ..model.config.parameter_counts import model_size
from ..model.config.shard_plan import ShardPlan
from ..model.quantization.calibration_file import CalibrationFile
from ..model.quantization.formats import BlockFormat
from ..model.quantization.recipes import HEAD, Recipe, Rule
from .memory_plan import bytes_of_ranks
from .rounding_sample import RoundingSampler
from .targets.target import Target

SENSITIVITY = 1.4
"""Nats, were the residual stream all error. Measured on SmolLM2, one part of one layer in 4 bits at a time: of 60
feed-forwards all but 6 are within half and twice of it (benchmarks/sensitivity.py)."""
PATTERN_LOSS = 0.25
"""Nats, were q or k all error, measured alike: from 0 to 1.2, with no rule that was found."""
LOGIT_LOSS = 0.33
"""Nats by mean square of what is added to the logits: measured on SmolLM2 in 4 bits."""
TABLE_LOSS = 0.8
"""Nats, were what every token begins with all error: measured on SmolLM2's table in 4, 5 and 6 bits."""
_WEIGHTS = {"o_proj": 1.6, "gate_up_proj": 2.0}
"""How much the error of a matrix counts, 1 for all others; gate and up of experts are one matrix."""


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
    """What a part can be stored as.

    Attributes:
        part: of the model.
        losses: nats of KL by format, as far as can be told beforehand.
        sizes: bytes by format.
    """

    part: Part
    losses: tuple[float, ...]
    sizes: tuple[float, ...]

    def steps(self) -> Iterator[tuple[float, float, int]]:
        """From the first format to better ones: what a byte saves, bytes, and the format that is reached.

        Each step is the one that saves most per byte from where the last one ended, so they save ever less.
        """
        at = 0
        while ahead := [(self._rate(at, to), self._cost(at, to), to) for to in range(at + 1, len(self.sizes))
                        if self.losses[to] < self.losses[at]]:
            best = max(ahead)
            yield best
            at = best[2]

    def _cost(self, at: int, to: int) -> float:
        return max(self.sizes[to] - self.sizes[at], 1.0)

    def _rate(self, at: int, to: int) -> float:
        return (self.losses[at] - self.losses[to]) / self._cost(at, to)


def allocate(choices: Sequence[Choice], room: float) -> list[int]:
    """The number of every part's format: steps in the order of what a byte saves, as long as there is room for them."""
    found, ended = [0] * len(choices), set()
    steps = [(rate, cost, index, to) for index, choice in enumerate(choices) for rate, cost, to in choice.steps()]
    for _, cost, index, to in sorted(steps, key=lambda step: step[0], reverse=True):
        if cost > room:
            ended.add(index)  # a later step of the part would begin where this one did not come
        elif index not in ended:
            room -= cost
            found[index] = to
    return found


def with_bits(recipe: Recipe, parts: Sequence[Part], recipes: Sequence[Recipe]) -> Recipe:
    """The recipe with rules for every part.

    Args:
        recipe: what else is said of weights.
        parts: all that have a choice.
        recipes: whose format each part has.
    """
    rules = [Rule(name, chosen.layout_of(*part.tensors))
             for part, chosen in zip(parts, recipes, strict=True) for name in part.names]
    return replace(recipe, rules=(*rules, *recipe.rules))


def bits_of(recipe: Recipe, parts: Sequence[Part]) -> dict[str, int]:
    """Bits of the weights of every part, for people and the manifest."""
    found: dict[str, int] = {}
    for part in parts:
        layout = recipe.layout_of(*part.tensors)
        found[part.name] = layout.bits if isinstance(layout, BlockFormat) else 8
    return found


def choices(
    parts: Sequence[Part], ladder: Sequence[Recipe], calibration: CalibrationFile,
    stored_bytes: Mapping[str, tuple[float, ...]], *, looks_up_head: bool = False,
) -> Iterator[Choice]:
    """What every part loses and takes in each of its formats.

    Args:
        parts: of the model.
        ladder: recipes with the formats, the fewest bits first.
        calibration: Hessians in the basis of the build.
        stored_bytes: of every weight by the recipes, by name.
        looks_up_head: the head is the table of tokens, too.
    """
    assert calibration.source is not None, "calibration_for gives every build its source"
    for part in parts:
        sampler = RoundingSampler(calibration, tuple(recipe.layout_of(*part.tensors) for recipe in ladder),
                                  rotated=ladder[0].rotated)
        losses, sizes = [0.0] * len(ladder), [0.0] * len(ladder)
        for name, shape in part.tensors.items():
            for which, loss in enumerate(_losses(sampler, name, shape, looks_up_head=looks_up_head)):
                losses[which] += loss
                sizes[which] += stored_bytes[name][which]
        yield Choice(part, tuple(losses), tuple(sizes))


def _losses(sampler: RoundingSampler, name: str, shape: Shape, *, looks_up_head: bool) -> list[float]:
    """Nats that a weight loses in each format."""
    if name != HEAD:
        all_error = _loss_of_all_error(sampler.calibration, name)
        return [all_error * error.relative_error for error in sampler.errors(name, shape)]
    if looks_up_head:
        return [LOGIT_LOSS * error.mean_square + TABLE_LOSS * error.relative_error
                for error in sampler.errors_of_tied_head(shape)]
    return [LOGIT_LOSS * error.mean_square for error in sampler.errors(name, shape)]


def _loss_of_all_error(calibration: CalibrationFile, name: str) -> float:
    """Nats, were the product with a matrix of a layer all error."""
    role = name.removesuffix(".weight").rsplit(".", 1)[-1]
    if role in ("q_proj", "k_proj"):
        return PATTERN_LOSS
    sublayer = ".".join(name.split(".")[:3])
    return SENSITIVITY * _WEIGHTS.get(role, 1.0) * calibration.residual_share(sublayer)


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
        HerdError: another recipe, no calibration, or fewer bits than everything in the fewest has.
    """
    if recipe.name != "int4":
        raise HerdError(f"--bits chooses between formats of 4 to 8 bits and goes with --recipe int4, not with "
                        f"{recipe.name}")
    if calibration is None or calibration.source is None:
        raise HerdError("--bits chooses by what rounding does to data: pass --calibration DIRECTORY, written by "
                        "`herdgraph calibrate`")
    width, packed = target.float_bytes, target.packs_weights
    ladder, parts = target.ladder, parts_of(calibration.source.config)
    smallest = with_bits(recipe, parts, [ladder[0]] * len(parts))
    least = sum(bytes_of_ranks(config, smallest, ShardPlan(), float_bytes=width, packed=packed))
    room = _room(bits, least, model_size(config).total)
    sizes = {name: tuple(each.stored_bytes(name, shape, width, packed=packed) for each in ladder)
             for part in parts for name, shape in part.tensors.items()}
    looks_up_head = packed and config.text.tie_word_embeddings  # passes/native/tied_table.py
    chosen = allocate(list(choices(parts, ladder, calibration, sizes, looks_up_head=looks_up_head)), room)
    found = with_bits(recipe, parts, [ladder[which] for which in chosen])
    return found, bits_of(found, parts)


def _room(bits: float, least: float, parameters: int) -> float:
    """Bytes that a target leaves beyond everything in the fewest bits."""
    room = bits * parameters / 8 - least
    if room < 0:
        raise HerdError(f"--bits {bits:g} cannot be met: with everything in 4 bits this model has "
                        f"{math.ceil(800 * least / parameters) / 100:.2f} bits per weight, norms, router and embedding "
                        "included; ask for as many, or leave the option away")
    return room
