"""How a model is split over several devices: which rank holds which part of which tensor. Torch-free.

    world = pipeline · expert · tensor        rank = (stage · expert + e) · tensor + t

The ``width`` = expert · tensor ranks of a stage hold the same layers and form one group, inside of which activations
are replicated; w = e · tensor + t is a rank's place in it.

==========================  ======================================================================================
part                        who holds it
==========================  ======================================================================================
layers                      stages: contiguous ranges, as even as possible; the first ones are the longer ones
attention                   split over the width by query heads; KV heads go with the queries that read them: when
                            there are fewer of them than ranks, several ranks hold the same one
dense, shared feed-forward  split over the width along F
routed experts              ``expert`` contiguous ranges of experts, each expert split ``tensor`` ways along F
embedding, head             first and last stage, split over the width by rows of the vocabulary; whole on every rank
                            when the vocabulary is no multiple of the width
router, norms               whole on every rank of their stage
image tower, projector      whole on rank 0
==========================  ======================================================================================

The sums over heads and over F are partial: a stage adds them up once after attention and once after the feed-forward.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace

from ...errors import HerdError
from .config import HerdConfig, TextConfig
from .names import expected_tensors

Parts = Mapping[int, tuple[range, ...]]
"""What a rank holds of a tensor: by axis, the ranges that are put side by side. Axes that are not named are whole."""

_KEYS = {"tp": "tensor", "ep": "expert", "pp": "pipeline"}
_MOST = 1 << 16
_IMAGES = ("vision_model.", "multi_modal_projector.")


@dataclass(frozen=True)
class ShardPlan:
    """A split of a model.

    Attributes:
        tensor: ranks that share every expert.
        expert: ranges of routed experts.
        pipeline: ranges of layers.
    """

    tensor: int = 1
    expert: int = 1
    pipeline: int = 1

    def __post_init__(self) -> None:
        for key, name in _KEYS.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= _MOST:
                raise HerdError(f"{key} is {value!r}, it must be a whole number within 1 and {_MOST}")

    @classmethod
    def parse(cls, text: str) -> ShardPlan:
        """Read ``tp=2,ep=4,pp=2``; what is not named is 1.

        Raises:
            HerdError: another form, a key given twice, or a number below 1.
        """
        values: dict[str, int] = {}
        for item in text.replace(" ", "").split(","):
            found = re.fullmatch(r"(tp|ep|pp)=(\d{1,9})", item, re.ASCII)
            if not found or _KEYS[found[1]] in values:
                problem = "is there twice" if found else "is not understood"
                raise HerdError(f"{item!r} {problem} in the plan {text!r}: write it as tp=2,ep=4,pp=2")
            values[_KEYS[found[1]]] = int(found[2])
        return cls(**values)

    def __str__(self) -> str:
        return ",".join(f"{key}={getattr(self, name)}" for key, name in _KEYS.items())

    def to_json(self) -> dict[str, int]:
        """Plain dictionary."""
        return asdict(self)

    @property
    def width(self) -> int:
        """Ranks of one stage."""
        return self.tensor * self.expert

    @property
    def world(self) -> int:
        """All ranks."""
        return self.width * self.pipeline

    def stage_of(self, rank: int) -> int:
        """The stage that a rank belongs to."""
        return rank // self.width

    def group_of(self, rank: int) -> range:
        """The ranks of a rank's stage."""
        first = self.stage_of(rank) * self.width
        return range(first, first + self.width)

    def layers_of(self, stage: int, num_layers: int) -> range:
        """The layers of a stage."""
        shorter, longer = divmod(num_layers, self.pipeline)
        first = stage * shorter + min(stage, longer)
        return range(first, first + shorter + (stage < longer))

    def experts_of(self, rank: int, num_experts: int) -> range:
        """The routed experts of a rank, in every mixture layer that it holds."""
        count = num_experts // self.expert
        first = rank % self.width // self.tensor * count
        return range(first, first + count)

    def splits_vocabulary(self, text: TextConfig) -> bool:
        """Whether ranks hold rows of embedding and head, not all of them."""
        return self.width > 1 and text.vocab_size % self.width == 0

    def local_text(self, text: TextConfig, rank: int) -> TextConfig:
        """The decoder as a rank's caches see it: its layers, counted from 0, and its heads."""
        layers = self.layers_of(self.stage_of(rank), text.num_layers)
        return replace(
            text, num_layers=len(layers), num_heads=text.num_heads // self.width,
            num_kv_heads=max(1, text.num_kv_heads // self.width),
            moe_layers=tuple(layer - layers.start for layer in text.moe_layers if layer in layers),
            rope_layers=text.rope_layers[layers.start : layers.stop],
            chunked_layers=text.chunked_layers[layers.start : layers.stop],
        )

    def parts(self, config: HerdConfig, name: str, rank: int) -> Parts | None:
        """What a rank holds of a tensor.

        Args:
            config: the whole model.
            name: canonical name.
            rank: within the world.

        Returns:
            Ranges by axis, empty when it is whole; None when the rank does not hold the tensor.
        """
        text, stage = config.text, self.stage_of(rank)
        if name.startswith(_IMAGES):
            return {} if rank == 0 else None
        if layer := re.match(r"layers\.(\d+)\.", name):
            held = int(layer[1]) in self.layers_of(stage, text.num_layers)
            return self._layer_parts(text, name, rank) if held else None
        ends = {"embed_tokens": (0, self.pipeline - 1) if text.tie_word_embeddings else (0,)}
        if stage not in ends.get(name.partition(".")[0], (self.pipeline - 1,)):
            return None
        if name == "norm.weight" or not self.splits_vocabulary(text):
            return {}
        return {0: (_share(text.vocab_size, rank % self.width, self.width),)}

    def _layer_parts(self, text: TextConfig, name: str, rank: int) -> Parts:
        place, role = rank % self.width, name.removesuffix(".weight").rsplit(".", 1)[-1]
        if ".experts." in name:
            inner = _share(text.expert_size, place % self.tensor, self.tensor)
            gate_up = (inner, range(text.expert_size + inner.start, text.expert_size + inner.stop))
            return {0: (self.experts_of(rank, text.num_experts),)} | (
                {2: gate_up} if role == "gate_up_proj" else {1: (inner,)})
        if role in ("q_proj", "o_proj"):
            heads = _share(text.num_heads, place, self.width)
            return {int(role == "o_proj"): (_scaled(heads, text.head_dim),)}
        if role in ("k_proj", "v_proj"):
            first = place * text.num_kv_heads // self.width
            heads = range(first, first + max(1, text.num_kv_heads // self.width))
            return {0: (_scaled(heads, text.head_dim),)}
        if role in ("gate_proj", "up_proj", "down_proj"):
            size = text.expert_size if ".shared_expert." in name else text.dense_size
            return {int(role == "down_proj"): (_share(size, place, self.width),)}
        return {}

    def fits(self, text: TextConfig) -> bool:
        """Whether a model can be split by this plan."""
        return not any(self._problems(text))

    def check(self, config: HerdConfig) -> None:
        """Refuse a plan that a model cannot be split by.

        Raises:
            HerdError: says which two numbers do not fit, and the nearest plan that does.
        """
        if problem := next(self._problems(config.text), ""):
            raise HerdError(f"the plan {self} does not fit: {problem}; the nearest that does is "
                            f"{self._nearest(config.text)}")

    def _problems(self, text: TextConfig) -> Iterator[str]:
        width, kv = self.width, text.num_kv_heads
        dense = len(text.moe_layers) < text.num_layers
        if self.pipeline > text.num_layers:
            yield f"{text.num_layers} layers are fewer than {self.pipeline} stages"
        if self.expert > 1 and not text.moe_layers:
            yield f"the model has no experts for {self.expert} ranges"
        if text.moe_layers and text.num_experts % self.expert:
            yield f"{text.num_experts} experts cannot be put into {self.expert} even ranges"
        if text.num_heads % width:
            yield f"{text.num_heads} attention heads cannot be split over {width} ranks evenly"
        if kv % width and width % kv:
            yield f"{kv} key/value heads and {width} ranks are no multiples of each other"
        for what, size, used in (("expert", text.expert_size, bool(text.moe_layers)),
                                 ("dense", text.dense_size, dense)):
            if used and size % width:
                yield f"the {what} feed-forward's width of {size} cannot be split over {width} ranks evenly"

    def _nearest(self, text: TextConfig) -> ShardPlan:
        """The valid plan of no more ranks with the least change of each number; a lost rank counts double."""
        fitting = (
            ShardPlan(tensor, expert, pipeline)
            for tensor in range(1, min(self.world, text.num_heads) + 1)
            for expert in range(1, min(self.world // tensor, max(1, text.num_experts)) + 1)
            for pipeline in range(1, min(self.world // (tensor * expert), text.num_layers) + 1)
        )
        valid = (plan for plan in fitting if plan.fits(text))
        return min(valid, key=lambda plan: (self._distance(plan), plan.pipeline, plan.expert))

    def _distance(self, other: ShardPlan) -> float:
        changes = sum(abs(math.log(getattr(self, name) / getattr(other, name))) for name in _KEYS.values())
        return changes + 2 * math.log(self.world / other.world)


def shapes_of_rank(plan: ShardPlan, config: HerdConfig, rank: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of everything that a rank holds."""
    held = {}
    for name, shape in expected_tensors(config).items():
        parts = plan.parts(config, name, rank)
        if parts is not None:
            held[name] = tuple(sum(map(len, parts[axis])) if axis in parts else size
                               for axis, size in enumerate(shape))
    return held


def _share(length: int, place: int, count: int) -> range:
    """One of ``count`` equal ranges."""
    return range(length * place // count, length * (place + 1) // count)


def _scaled(items: range, size: int) -> range:
    return range(items.start * size, items.stop * size)
