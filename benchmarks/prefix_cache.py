"""What the prefix cache gives: clients who ask different questions about one document, the first cold, the others warm.

    python -m benchmarks.prefix_cache BUNDLE [--tokens 4096] [--clients 8] [--threads 1] [--json]

Documents end before, on and after a boundary of the chunked layers' attention chunks, the nearest to ``--tokens``,
where there is one; with a bundle that reads images there is a picture in front of the document, too, and in the end
another picture in its place. *Cached* are the tokens that the other clients did not compute, of those that they could
have found: the document's full blocks. *Times* are to the first token, cold and warm (median). *Memory* is what all
clients together hold while they generate, blocks of both kinds of layers, against the document once and each client's
own end.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from rich.table import Table

from herdgraph.console import emit_json, run_cli
from herdgraph.model.processing import PreparedPrompt
from herdgraph.runtimes.kv_cache.pool import BLOCK_TOKENS

from .desk import Desk
from .screen import show_tables

QUESTION = 24
ANSWER = 24
"""Tokens; with the question less than a block."""


@dataclass(frozen=True)
class Document:
    """What everybody asks about.

    Attributes:
        name: in the table.
        token_ids: of it.
        pixels: of the tiles of the picture at its beginning.
        shared: tokens that a client can find in the cache.
    """

    name: str
    token_ids: list[int]
    pixels: np.ndarray | None
    shared: int


@dataclass(frozen=True)
class Found:
    """What was measured; seconds and blocks."""

    document: str
    tokens: int
    cached: float
    cold: float
    warm: float
    whole_blocks: int
    chunked_blocks: int
    memory: float


def lengths(tokens: int, chunk: int) -> dict[str, int]:
    """Lengths of documents by where they end."""
    if not chunk or tokens <= chunk // 2:
        return {"inside of a chunk": tokens}
    boundary = max(1, round(tokens / chunk)) * chunk
    return {"before a boundary": boundary - 32, "on a boundary": boundary, "after a boundary": boundary + 32}


def documents(desk: Desk, tokens: int) -> Iterator[Document]:
    """Those without a picture first."""
    random, text = np.random.default_rng(0), desk.engine.config.text
    chunk = text.attention_chunk_size if any(text.chunked_layers) else 0
    ids = random.integers(3, text.vocab_size * 9 // 10, tokens + chunk).tolist()
    for name, length in lengths(tokens, chunk).items():
        yield Document(name, ids[:length], None, length // BLOCK_TOKENS * BLOCK_TOKENS)
    if desk.engine.vision is None:
        return
    first, second = (_shown(desk, random) for _ in range(2))
    for name, length in lengths(tokens, chunk).items():
        begin = first.token_ids + ids[: length - len(first.token_ids)]
        yield Document(f"a picture, {name}", begin, first.pixel_values, length // BLOCK_TOKENS * BLOCK_TOKENS)
    at = begin.index(desk.engine.config.image_token_id)
    yield Document("another picture", begin, second.pixel_values, at // BLOCK_TOKENS * BLOCK_TOKENS)


def _shown(desk: Desk, random: np.random.Generator) -> PreparedPrompt:
    """A picture of noise, as the beginning of a prompt."""
    vision = desk.engine.config.vision
    assert vision is not None, "asked for where there is a tower"
    noise = random.integers(0, 256, (vision.image_size, vision.image_size, 3), dtype=np.uint8)
    return desk.engine.processor.prepare([
        {"role": "user", "content": [{"type": "image", "image": Image.fromarray(noise)}]}])


def measure(desk: Desk, document: Document, clients: int) -> Found:
    """One client after the other, then all at the same time."""
    if document.name != "another picture":
        desk.prefixes.clear()
    prompts = [PreparedPrompt(document.token_ids + _question(client), document.pixels) for client in range(clients)]
    seconds, cached = [], []
    for prompt in prompts:
        answer = desk.ask(prompt, 1)
        desk.run()
        seconds.append(answer.usage.first_token_seconds)
        cached.append(answer.usage.cached_tokens)
    if document.name == "another picture":  # its first client is the one that may find only what lies before it
        cached = cached[:1] * 2
    for prompt in prompts:
        desk.ask(prompt, ANSWER)
    desk.run_until_all_decode()
    whole, chunked = held(desk)
    tokens = len(document.token_ids)
    found = Found(document.name, tokens, statistics.fmean(cached[1:]) / max(1, document.shared), seconds[0],
                  statistics.median(seconds[1:]), whole, chunked,
                  _times_needed(desk, tokens // BLOCK_TOKENS, whole, chunked))
    desk.run()
    return found


def _question(client: int) -> list[int]:
    return np.random.default_rng(1 + client).integers(3, 400, QUESTION).tolist()


def held(desk: Desk) -> tuple[int, int]:
    """Blocks that running answers refer to, each counted once: of layers that see everything, and of chunked ones."""
    caches = [choice.sequence.cache for choice in desk.scheduler.running if choice.sequence is not None]
    tables = ([cache.whole.numbers for cache in caches], [cache.chunked.numbers for cache in caches])
    whole, chunked = (len(set(np.concatenate(table).tolist())) for table in tables)
    return whole, chunked


def _times_needed(desk: Desk, common: int, whole: int, chunked: int) -> float:
    """Bytes that are held, of those that sharing needs: ``common`` blocks once, and each answer's own ones."""
    pools, sequences = desk.pools, [choice.sequence for choice in desk.scheduler.running if choice.sequence is not None]
    of_chunk = pools.chunk // BLOCK_TOKENS
    needed = common * pools.whole.cost
    firsts = set()
    for sequence in sequences:
        end = -(-len(sequence) // BLOCK_TOKENS)
        needed += (end - common) * pools.whole.cost
        first = (end - 1) // of_chunk * of_chunk if of_chunk else end
        firsts.add(first)
        needed += (end - max(common, first)) * pools.chunked.cost
    needed += max(0, common - min(firsts)) * pools.chunked.cost
    return (whole * pools.whole.cost + chunked * pools.chunked.cost) / needed


def table(rows: Sequence[Found]) -> Table:
    """Rows for people."""
    shown = Table("document", "tokens", "cached", "first token, cold", "warm", "warm / cold", "blocks", "chunked",
                  "memory / needed")
    for row in rows:
        shown.add_row(row.document, str(row.tokens), f"{row.cached:.1%}", f"{1e3 * row.cold:,.0f} ms",
                      f"{1e3 * row.warm:,.0f} ms", f"{row.warm / row.cold:.3f}", str(row.whole_blocks),
                      str(row.chunked_blocks), f"{row.memory:.2f}")
    return shown


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    desk = Desk.of(options.bundle, options.threads)
    desk.ask(PreparedPrompt([400] * 40), 4)
    desk.run()
    rows = [measure(desk, document, options.clients) for document in documents(desk, options.tokens)]
    emit_json([asdict(row) for row in rows]) if options.json else show_tables(table(rows))


if __name__ == "__main__":
    run_cli(main)
