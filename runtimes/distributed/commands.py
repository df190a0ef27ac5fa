"""What rank 0 tells the others: which sequences, how long they are, which tokens come next.

A command is a line of int64: its kind, sizes, then keys [B], lengths [B], token ids [B, T] and rows [R].
Nearly every command of a generation fits into the first ``HEAD`` words, which is one broadcast; the rest and image
features [P, D] follow when there are any. ``lengths`` say where each sequence goes on: a rank that has more forgets it.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from enum import IntEnum
from itertools import chain

import numpy as np

from .collectives import Array, Collectives

HEAD = 32
_SIZES = 6


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


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        kind: what is to be done.
        keys: sequences by number.
        lengths: tokens that each already holds.
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


def broadcast_command(link: Collectives, command: Command) -> None:
    """Send a command to every other rank."""
    tokens = len(command.ids_BT[0]) if command.ids_BT else 0
    images = 0 if command.features_PD is None else len(command.features_PD)
    words = [command.kind, len(command.keys), len(command.lengths), tokens, len(command.rows), images]
    words += [*command.keys, *command.lengths, *chain.from_iterable(command.ids_BT), *command.rows]
    words += [0] * (HEAD - len(words))
    link.broadcast(np.array(words[:HEAD], np.int64))
    if len(words) > HEAD:
        link.broadcast(np.array(words[HEAD:], np.int64))
    if command.features_PD is not None and images:
        link.broadcast(np.ascontiguousarray(command.features_PD))


def receive_command(link: Collectives, width: int) -> Command:
    """Wait for the next command.

    Args:
        link: to rank 0.
        width: of image features.
    """
    head = np.empty(HEAD, np.int64)
    link.broadcast(head)
    kind, count, known, tokens, wanted, images = head[:_SIZES].tolist()
    ends = np.cumsum((count, known, known * tokens, wanted))
    rest = np.empty(max(0, _SIZES + ends[-1] - HEAD), np.int64)
    if rest.size:
        link.broadcast(rest)
    features_PD = np.empty((images, width), np.float32)
    if images:
        link.broadcast(features_PD)
    keys, lengths, ids, rows, _ = (part.tolist() for part in np.split(np.concatenate((head[_SIZES:], rest)), ends))
    ids_BT = [ids[begin * tokens : (begin + 1) * tokens] for begin in range(known)]
    return Command(Kind(kind), keys, lengths, ids_BT, rows, features_PD)
