"""Attention of packed rows, segment by segment and behind a mask of every pair of tokens: processor time.

    python -m benchmarks.packed_attention [--threads 1] [--rounds 5]

Forward and backward of one layer (8 heads of 32, 2 of keys and values, float32). Documents have random lengths with the
given mean, as pages of text have; a layer with a chunk cuts them further. The mask is what the decoder built until
November 2026, made once for all layers of a step and therefore not timed; outputs of both are compared.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from functools import partial

import torch
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from herdgraph.model.llama4.operators import causal_segments, full_sequence_attention

from .screen import show_tables

HEADS, GROUPS, WIDTH = 8, 2, 32
CASES = ((4, 256, 256, 0), (4, 256, 256, 128), (4, 256, 60, 0), (4, 1024, 1024, 0), (4, 1024, 200, 0), (4, 1024, 20, 0),
         (1, 4096, 4096, 0), (1, 4096, 4096, 512), (1, 4096, 400, 0))
"""Rows, their length, mean length of a document (of the row: one document), chunk."""


def documents_of(rows: int, length: int, mean: int) -> list[int]:
    """Lengths of the documents of all rows."""
    drawn, found = random.Random(0), []
    for _ in range(rows):
        left = length
        while left:
            found.append(left if mean == length else min(left, 1 + int(drawn.expovariate(1 / mean))))
            left -= found[-1]
    return found


def masked(q_BTN: Tensor, k_BTM: Tensor, v_BTM: Tensor, visible_B1TT: Tensor) -> Tensor:
    """Attention behind a mask."""
    q, k, v = (x.unflatten(-1, (-1, WIDTH)).transpose(1, 2) for x in (q_BTN, k_BTM, v_BTM))
    y = functional.scaled_dot_product_attention(q, k, v, attn_mask=visible_B1TT, enable_gqa=True)
    return y.transpose(1, 2).flatten(2)


def mask_of(rows: int, documents: list[int], chunk: int) -> Tensor:
    """Who sees whom, bool [B, 1, T, T]."""
    lengths = causal_segments(documents, chunk)
    segment_BT = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).view(rows, -1)
    return (segment_BT[:, :, None] == segment_BT[:, None]).tril()[:, None]


def milliseconds(attend: Callable[..., Tensor], operands: list[Tensor], rounds: int) -> float:
    """Processor time of a forward and backward pass, the least of some."""
    found = []
    for _ in range(1 + rounds):
        started = time.process_time()
        y = attend(*operands)
        torch.autograd.grad(y, operands, torch.ones_like(y))
        found.append(1e3 * (time.process_time() - started))
    return min(found[1:])


def compared(rows: int, length: int, mean: int, chunk: int, rounds: int) -> list[str]:
    """A row of the table."""
    documents, generator = documents_of(rows, length, mean), torch.Generator().manual_seed(0)
    operands = [torch.randn(rows, length, heads * WIDTH, generator=generator).requires_grad_()
                for heads in (HEADS, GROUPS, GROUPS)]
    before = partial(masked, visible_B1TT=mask_of(rows, documents, chunk))
    now = partial(full_sequence_attention, num_heads=HEADS, kv_heads=GROUPS, chunk=chunk, documents=documents)
    with torch.no_grad():
        apart = float((before(*operands) - now(*operands)).abs().max())
    took, takes = (milliseconds(attend, operands, rounds) for attend in (before, now))
    return [f"{rows} x {length}", str(mean), str(chunk), str(len(causal_segments(documents, chunk))),
            f"{took:.1f} ms", f"{takes:.1f} ms", f"{took / takes:.1f}", f"{apart:.0e}"]


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    table = Table(title=f"attention of one layer, forward and backward, {args.threads} thread(s)")
    for column in ("rows", "documents of", "chunk", "segments", "mask", "segment by segment", "ratio", "apart by"):
        table.add_column(column)
    for case in CASES:
        table.add_row(*compared(*case, args.rounds))
    show_tables(table)


if __name__ == "__main__":
    main()
