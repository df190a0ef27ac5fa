"""What each device of a shard plan holds: weights by part of the model, keys and values, activations.

All ranks of a stage hold the same, but for the image tower, which is the first rank's. Bytes of a rank:

    weights       the slices of its stage's layers, as the recipe stores them
    keys, values  2 · its KV heads · bytes of a token's keys · slots, for each layer and sequence; slots = the context
                  in global layers, at most the chunk in chunked ones
    activations   of the largest call: a chunk of a prompt, or a token of each sequence
    reserve       what driver, runtime and fragmentation take: a share of the device, assumed

Batch and context are those of one replica.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from ...model.config import HerdConfig, TextConfig
from ...model.config.names import Shape, expected_tensors
from ...model.config.shard_plan import ShardPlan
from ...runtimes.executors.runner import PREFILL_CHUNK, prefill_chunk_len
from .storage import Storage

RESERVE = 0.05
"""Share of a device's memory that is not planned with."""

PARTS = (
    (".experts.", "routed experts"), (".shared_expert.", "shared experts"), (".router.", "router and norms"),
    (".feed_forward.", "dense feed-forward"), (".self_attn.", "attention"), ("embed_tokens", "embedding and head"),
    ("lm_head", "embedding and head"), ("", "router and norms"),
)
"""Parts of the decoder by what stands in a canonical name; the first that does decides."""
IMAGE_TOWER = "image tower"
_IMAGES = ("vision_model.", "multi_modal_projector.")


@dataclass(frozen=True)
class Workload:
    """What is served: ``batch`` sequences at once, each of ``context`` tokens."""

    context: int
    batch: int


def part_of(name: str) -> str:
    """The part of the model that a tensor belongs to, by its canonical name."""
    if name.startswith(_IMAGES):
        return IMAGE_TOWER
    return next(part for word, part in PARTS if word in name)


def local_kv_heads(plan: ShardPlan, text: TextConfig) -> int:
    """Key/value heads of a rank: replicated when there are more ranks than heads."""
    return max(1, text.num_kv_heads // plan.width)


def rank_tensors(config: HerdConfig, plan: ShardPlan, stage: int, *, images: bool) -> Iterator[tuple[str, Shape, int]]:
    """The tensors that a rank of a stage holds: name, shape of the rank's slice, and how many layers have one like it.

    Args:
        config: the model.
        plan: how it is split.
        stage: of the pipeline.
        images: with the image tower, which the first of all ranks has.
    """
    rank, shapes, layers = stage * plan.width, _shapes(config), plan.layers_of(stage, config.text.num_layers)
    moe = [layer in config.text.moe_layers for layer in layers]
    for kind in sorted(set(moe)):  # layers of a kind are alike: the first of each stands for all
        prefix = f"layers.{layers[moe.index(kind)]}."
        for name, shape in shapes.layers[kind]:
            yield prefix + name, _local(config, plan, prefix + name, shape, rank), moe.count(kind)
    for name, shape in shapes.ends:
        if plan.parts(config, name, rank) is not None:
            yield name, _local(config, plan, name, shape, rank), 1
    for name, shape in shapes.images if images else ():
        yield name, shape, 1


def _local(config: HerdConfig, plan: ShardPlan, name: str, shape: Shape, rank: int) -> Shape:
    parts = plan.parts(config, name, rank) or {}
    return tuple(sum(map(len, parts[axis])) if axis in parts else size for axis, size in enumerate(shape))


@dataclass(frozen=True)
class _Shapes:
    """Shapes by name: of a layer with experts (True) and without, of the decoder's ends, of the image tower."""

    layers: dict[bool, list[tuple[str, Shape]]]
    ends: list[tuple[str, Shape]]
    images: list[tuple[str, Shape]]


@cache
def _shapes(config: HerdConfig) -> _Shapes:
    moe = [layer in config.text.moe_layers for layer in range(config.text.num_layers)]
    shapes = expected_tensors(config)
    layers: dict[bool, list[tuple[str, Shape]]] = {}
    for kind in set(moe):
        prefix = f"layers.{moe.index(kind)}."
        layers[kind] = [(name.removeprefix(prefix), shape) for name, shape in shapes.items() if name.startswith(prefix)]
    images = [(name, shape) for name, shape in shapes.items() if name.startswith(_IMAGES)]
    ends = [(name, shape) for name, shape in shapes.items() if not name.startswith(("layers.", *_IMAGES))]
    return _Shapes(layers, ends, images)


def weights(config: HerdConfig, plan: ShardPlan, storage: Storage, stage: int, *, images: bool) -> dict[str, float]:
    """Bytes of weights of a rank of a stage by part of the model."""
    found: dict[str, float] = {}
    for name, shape, count in rank_tensors(config, plan, stage, images=images):
        part = part_of(name)
        found[part] = found.get(part, 0.0) + count * storage.bytes_of(name, shape)
    return found


def caches(text: TextConfig, plan: ShardPlan, stage: int, storage: Storage, context: int) -> tuple[float, float]:
    """Bytes of keys and values of one sequence on a rank of a stage: (global layers, chunked layers)."""
    slot = 2 * local_kv_heads(plan, text) * storage.row_bytes(text.head_dim)
    chunks = [text.chunk_of(layer) for layer in plan.layers_of(stage, text.num_layers)]
    local = sum(min(context, chunk) for chunk in chunks if chunk)
    return slot * context * chunks.count(0), slot * local


def chunk_len(storage: Storage, heads: int, past: int) -> int:
    """Tokens of a prompt in one call; our own CPU operators hold no scores that would have to stay small."""
    return PREFILL_CHUNK if storage.on_cpu else prefill_chunk_len(heads, past)


def activations(config: HerdConfig, plan: ShardPlan, storage: Storage, workload: Workload) -> float:
    """Bytes of the largest call of a rank: residuals, the widest layer, logits; on a GPU scores as if unfused."""
    text = config.text
    heads = text.num_heads // plan.width
    chunk = chunk_len(storage, heads, workload.context)
    tokens = max(chunk, workload.batch)
    inner = max(text.dense_size if len(text.moe_layers) < text.num_layers else 0, text.expert_size)
    row = 4 * text.hidden_size + 3 * max(inner // plan.width, (heads + 2 * local_kv_heads(plan, text)) * text.head_dim)
    scores = 0 if storage.on_cpu else 4 * heads * workload.context * tokens
    return tokens * row * storage.float_bytes + scores + 4 * workload.batch * text.vocab_size


def rank_memory(
    config: HerdConfig, plan: ShardPlan, storage: Storage, workload: Workload, stage: int, *, images: bool
) -> dict[str, float]:
    """Bytes of a rank by part, without the reserve."""
    per_sequence = caches(config.text, plan, stage, storage, workload.context)
    return {
        **weights(config, plan, storage, stage, images=images),
        "keys and values, global layers": workload.batch * per_sequence[0],
        "keys and values, chunked layers": workload.batch * per_sequence[1],
        "activations": activations(config, plan, storage, workload),
    }


def representative_stages(config: HerdConfig, plan: ShardPlan) -> list[int]:
    """For every stage the first that holds and computes the same, which stands for it: there are a handful of kinds."""
    first: dict[tuple[int, ...], int] = {}
    found = []
    for stage in range(plan.pipeline):
        layers = plan.layers_of(stage, config.text.num_layers)
        moe = sum(layer in config.text.moe_layers for layer in layers)
        chunked = sum(config.text.chunk_of(layer) > 0 for layer in layers)
        kind = (len(layers), moe, chunked, stage == 0, stage == plan.pipeline - 1)
        found.append(first.setdefault(kind, stage))
    return found


def fullest_rank(config: HerdConfig, plan: ShardPlan, storage: Storage, workload: Workload) -> dict[str, float]:
    """Bytes by part of the rank that holds most."""
    kinds = (rank_memory(config, plan, storage, workload, stage, images=stage == 0)
             for stage in sorted(set(representative_stages(config, plan))))
    return max(kinds, key=lambda parts: sum(parts.values()))


def weight_total(config: HerdConfig, storage: Storage) -> float:
    """Bytes of all weights, unsharded."""
    return sum(storage.bytes_of(name, shape) for name, shape in expected_tensors(config).items())

