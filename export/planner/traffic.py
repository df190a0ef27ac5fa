"""Bytes that the busiest rank of each stage reads and exchanges in one call, and operations that it computes.

A call has n tokens. Of E experts, each token uses k. With even routing the layer touches

    distinct = E (1 - (1 - k/E)^n)

of them, and only those are read. They lie on ``expert`` groups of ranks, unevenly: a stage waits for the group that
was touched most. With q = distinct / E a group of G experts has Binomial(G, q) of them, so that the most of g groups is

    busiest = sum_m 1 - P(Binomial(G, q) <= m)^g         at least ceil(k / g), at least distinct / g

Everything else is read whole, and keys and values as far as they are visible. Collectives are those of
``model/config/shard_plan.py``: two AllReduces per layer, one for the embedding, an AllGather of logits; Sends between
stages.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ...model.config import HerdConfig, TextConfig
from ...model.config.shard_plan import ShardPlan
from .memory import caches, part_of, rank_tensors
from .storage import Storage


@dataclass(frozen=True)
class Call:
    """Tokens that are computed together.

    Attributes:
        sequences: number of sequences.
        tokens: tokens of each sequence.
        past: tokens that each sequence had before.
        logits: rows of logits of all sequences together.
    """

    sequences: int
    tokens: int
    past: int
    logits: int

    @property
    def rows(self) -> int:
        """Tokens of all sequences."""
        return self.sequences * self.tokens


@dataclass(frozen=True)
class Collective:
    """One kind of exchange: how often, between how many ranks, and the bytes that each of them has in the end."""

    op: Literal["all_reduce", "all_gather", "send"]
    count: int
    ranks: int
    bytes: float


@dataclass(frozen=True)
class Work:
    """Work of the busiest rank of a stage in one call.

    Attributes:
        layers: number of layers of the stage.
        weight_bytes: bytes of weights that are read.
        cache_bytes: bytes of keys and values that are read.
        products: operations of products with quantised weights.
        float_operations: operations of attention, router and head, in the type of floats.
        collectives: exchanges inside of the stage.
    """

    layers: int
    weight_bytes: float
    cache_bytes: float
    products: float
    float_operations: float
    collectives: tuple[Collective, ...]


def distinct_experts(experts: int, top_k: int, tokens: float) -> float:
    """Expected number of experts that a layer touches, with even routing."""
    return experts * (1 - (1 - top_k / experts) ** tokens) if experts else 0.0


def busiest_group(experts: int, top_k: int, tokens: float, groups: int) -> float:
    """Expected number of touched experts in the group of ranks that has most of them."""
    touched, each = distinct_experts(experts, top_k, tokens), experts // groups
    if groups == 1:
        return touched
    q, below, most = touched / experts, 0.0, 0.0
    for count in range(each):
        below += math.comb(each, count) * q**count * (1 - q) ** (each - count)
        most += 1 - min(below, 1.0) ** groups
    return min(max(most, touched / groups, -(-top_k // groups)), each)


def work_of(config: HerdConfig, plan: ShardPlan, storage: Storage, stage: int, call: Call) -> Work:
    """Work of the busiest rank of a stage in a call."""
    text = config.text
    read = products = floats = 0.0
    for name, shape, count in rank_tensors(config, plan, stage, images=False):
        share, rows = _used(text, plan, stage, call, name)
        read += share * count * storage.bytes_of(name, shape)
        operations = 2 * rows * count * math.prod(shape)
        if storage.layout_of(name, shape) is None:
            floats += operations
        else:
            products += operations
    return Work(
        layers=len(plan.layers_of(stage, text.num_layers)), weight_bytes=read, products=products,
        cache_bytes=call.sequences * sum(caches(text, plan, stage, storage, call.past + call.tokens)),
        float_operations=floats + _attention(text, plan, stage, call),
        collectives=tuple(_collectives(text, plan, storage, stage, call)),
    )


def _used(text: TextConfig, plan: ShardPlan, stage: int, call: Call, name: str) -> tuple[float, float]:
    """Of a tensor: the share of it that a call reads, and the rows that each of its weights multiplies."""
    if part_of(name) == "routed experts":
        return _routed(text, plan, call)
    tied_head = text.tie_word_embeddings and stage == plan.pipeline - 1
    if name.startswith("lm_head") or (name.startswith("embed_tokens") and tied_head):
        return float(call.logits > 0), float(call.logits)
    if name.startswith("embed_tokens"):  # looked up: a row is nothing beside the rest
        return 0.0, 0.0
    return 1.0, float(call.rows)


def _routed(text: TextConfig, plan: ShardPlan, call: Call) -> tuple[float, float]:
    """Of the routed experts of the busiest group: the share that is read, and the rows that each of them multiplies.

    The group gets as large a share of all rows as it has of the touched experts.
    """
    experts, top_k = text.num_experts, text.top_k
    busiest, each = busiest_group(experts, top_k, call.rows, plan.expert), experts // plan.expert
    rows = call.rows * top_k * busiest / distinct_experts(experts, top_k, call.rows)
    return busiest / each, rows / each


def _attention(text: TextConfig, plan: ShardPlan, stage: int, call: Call) -> float:
    """Operations of scores and of their sums: on average a token sees half of its call; chunks are counted full."""
    past = call.past + (call.tokens + 1) / 2
    visible = sum(min(past, text.chunk_of(layer) or past) for layer in plan.layers_of(stage, text.num_layers))
    return 4 * (text.num_heads // plan.width) * text.head_dim * visible * call.rows


def _collectives(text: TextConfig, plan: ShardPlan, storage: Storage, stage: int, call: Call) -> Iterator[Collective]:
    if plan.width == 1:
        return
    hidden = float(call.rows * text.hidden_size * storage.float_bytes)
    split = plan.splits_vocabulary(text)
    sums = 2 * len(plan.layers_of(stage, text.num_layers)) + (stage == 0 and split)
    yield Collective("all_reduce", sums, plan.width, hidden)
    if stage == plan.pipeline - 1 and split and call.logits:
        yield Collective("all_gather", 1, plan.width, 4.0 * call.logits * text.vocab_size)


def sends(text: TextConfig, plan: ShardPlan, storage: Storage, call: Call) -> tuple[Collective, ...]:
    """Exchanges between stages: hidden states to the next, logits from the last to the first."""
    if plan.pipeline == 1:
        return ()
    hidden = Collective("send", plan.pipeline - 1, 2, float(call.rows * text.hidden_size * storage.float_bytes))
    return hidden, Collective("send", 1, 2, 4.0 * call.logits * text.vocab_size)


def collectives_per_token(text: TextConfig, plan: ShardPlan) -> int:
    """Exchanges that a token has to wait for, one after the other."""
    inside = 0 if plan.width == 1 else 2 * text.num_layers + 2 * plan.splits_vocabulary(text)
    return inside + (plan.pipeline if plan.pipeline > 1 else 0)


def cache_bytes(text: TextConfig, storage: Storage, context: int) -> float:
    """Bytes of keys and values of one sequence, all layers and heads."""
    slots = sum(min(context, text.chunk_of(layer) or context) for layer in range(text.num_layers))
    return 2.0 * text.num_kv_heads * storage.row_bytes(text.head_dim) * slots
