"""What rank 0 tells the others: what to compute for which sequences.

A command is a line of int64: its kind, the number of image features, the sizes of its parts, then the parts. Nearly
every command of a generation fits into the first ``HEAD`` words, which is one broadcast; the rest and image features
[P, D] follow when there are any.

Where keys and values lie in cache blocks, rank 0 decides which block is whose, and says so in every command: the others
keep no sequences. Where each sequence has buffers of its own, every rank has them, and knows sequences by number.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from enum import IntEnum
from itertools import accumulate, chain, pairwise

import numpy as np

from ..executors.blocks import PlacedStep
from .collectives import Array, Collectives

HEAD = 64
_PARTS = 6
"""Parts of a command, most of them empty in most kinds."""
_SIZES = 2 + _PARTS


class Kind(IntEnum):
    """What is to be done."""

    END = 0
    DECODE = 1
    """One token for each of B sequences."""
    PREFILL_CHUNK = 2
    """T tokens for one sequence."""
    FORK = 3
    """Copy the first key's sequence to the second."""
    FREE = 4
    STEP = 5
    """Tokens for several sequences, in cache blocks."""


@dataclass(frozen=True)
class Message:
    """What goes over the wire.

    Attributes:
        kind: what is to be done.
        parts: lists of numbers, at most ``_PARTS``.
        features_PD: behind the image tokens.
    """

    kind: Kind
    parts: Items[Items[int] | Array] = ()
    features_PD: Array | None = None


def broadcast_message(link: Collectives, message: Message) -> None:
    """Send a message to every other rank."""
    features_PD = message.features_PD
    images = 0 if features_PD is None else len(features_PD)
    parts = [np.asarray(part, np.int64) for part in message.parts]
    parts += [np.zeros(0, np.int64)] * (_PARTS - len(parts))
    words = np.concatenate(([message.kind, images, *map(len, parts)], *parts, np.zeros(HEAD)), dtype=np.int64,
                           casting="unsafe")
    link.broadcast(words[:HEAD].copy())
    if len(words) > 2 * HEAD:
        link.broadcast(words[HEAD:-HEAD].copy())
    if features_PD is not None and images:
        link.broadcast(np.ascontiguousarray(features_PD))


def receive_message(link: Collectives, width: int) -> Message:
    """Wait for the next message.

    Args:
        link: to rank 0.
        width: of image features.
    """
    head = np.empty(HEAD, np.int64)
    link.broadcast(head)
    kind, images, *sizes = head[:_SIZES].tolist()
    rest = np.empty(max(0, _SIZES + sum(sizes) - HEAD), np.int64)
    if rest.size:
        link.broadcast(rest)
    features_PD = np.empty((images, width), np.float32)
    if images:
        link.broadcast(features_PD)
    words = np.concatenate((head[_SIZES:], rest))
    parts = [words[begin:end] for begin, end in pairwise(accumulate(sizes, initial=0))]
    return Message(Kind(kind), parts, features_PD)


@dataclass(frozen=True)
class Command:
    """One command over sequences that every rank keeps.

    Attributes:
        kind: what is to be done.
        keys: sequences by number.
        lengths: tokens that each already holds: a rank that has more forgets it.
        ids_BT: tokens to append.
        rows: positions whose logits are wanted.
        features_PD: behind the image tokens among ``ids_BT``.
    """

    kind: Kind
    keys: Items[int] = ()
    lengths: Items[int] = ()
    ids_BT: Items[Items[int]] = ()
    rows: Items[int] = ()
    features_PD: Array | None = None

    def message(self) -> Message:
        """On the wire."""
        ids = list(chain.from_iterable(self.ids_BT))
        return Message(self.kind, (self.keys, self.lengths, ids, self.rows), self.features_PD)

    @classmethod
    def of(cls, message: Message) -> Command:
        """From the wire."""
        keys, lengths, ids, rows, *_ = (np.asarray(part).tolist() for part in message.parts)
        tokens = len(ids) // max(1, len(lengths))
        ids_BT = [ids[begin * tokens : (begin + 1) * tokens] for begin in range(len(lengths))]
        return cls(message.kind, keys, lengths, ids_BT, rows, message.features_PD)


@dataclass(frozen=True)
class StepCommand:
    """One call over cache blocks.

    Attributes:
        steps: what each sequence gets, and where.
        copies: blocks to be copied before, as (1 where it is of chunked layers, block, its copy).
    """

    steps: Items[PlacedStep]
    copies: Items[tuple[int, int, int]] = ()

    def message(self) -> Message:
        """On the wire."""
        steps = self.steps
        sizes = [(step.past, len(step.token_ids), len(step.rows), len(step.whole), len(step.chunked),
                  0 if step.features is None else len(step.features)) for step in steps]
        parts = [np.concatenate([np.asarray(part, np.int64) for part in column]) for column in (
            sizes, [step.token_ids for step in steps], [step.rows for step in steps], [step.whole for step in steps],
            [step.chunked for step in steps])]
        features = [step.features for step in steps if step.features is not None and len(step.features)]
        copies = np.array(self.copies, np.int64).reshape(-1)
        return Message(Kind.STEP, (*parts, copies), np.concatenate(features) if features else None)

    @classmethod
    def of(cls, message: Message) -> StepCommand:
        """From the wire."""
        sizes, *lists, copies = (np.asarray(part) for part in message.parts)
        pasts, *counts = sizes.reshape(-1, 6).T
        assert message.features_PD is not None, "at least an empty array was received"
        columns = [np.split(values, np.cumsum(count)[:-1])
                   for values, count in zip((*lists, message.features_PD), counts, strict=True)]
        steps = [PlacedStep(ids.tolist(), int(past), rows.tolist(), whole, chunked, features)
                 for past, ids, rows, whole, chunked, features in zip(pasts, *columns, strict=True)]
        return cls(steps, [(int(kind), int(block), int(twin)) for kind, block, twin in copies.reshape(-1, 3)])
