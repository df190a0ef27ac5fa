"""Whether a bundle finds things in long documents: dictionary look-ups with exact answers, 1k to 8k tokens.

    python -m benchmarks.retrieval fp32=BUNDLE int8=BUNDLE int8-kv8=BUNDLE --glosses data.noun
                                   [--lengths 1024 2048 4096 8000] [--documents 4] [--alone 4] [--threads 2]

A document is a dictionary of WordNet's nouns whose glosses were dealt out anew, so that what a model knows of a word
does not help. In the end a headword stands once more; *found* is how often its own gloss is likelier than three others
of the same document, by the log-likelihood per character, *exact* how often every token of it is the most likely one,
and *nats* is the mean negative log-likelihood of its tokens. Words are asked from all depths of a document.

A document is computed once for all its questions, in prefill chunks, and every answer goes on from a fork of it: what
a prefix cache does. *alone* compares that with whole prompts of their own: the largest difference of a log-likelihood
over some answers. WordNet is the Debian package wordnet-base.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Sequence as Items
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich import box
from rich.table import Table

from herdgraph.console import run_cli, stderr
from herdgraph.errors import HerdError
from herdgraph.model.processing import Tokenizer
from herdgraph.runtimes import Engine
from herdgraph.runtimes.evaluation.likelihood import EncodedPair, LogLikelihood, Scorer, encode_pair

from .screen import show_tables
from .tasks import named

ASKED = 16
"""Headwords of a document, from its beginning to its end."""
OPTIONS = 4
_ENTRY = re.compile(r"^\d{8} \d\d n [0-9a-f]{2} ([a-z]{4,12}) .*\| ([^;]{20,80}?)\s*(?:;|$)")


@dataclass(frozen=True)
class Document:
    """A dictionary and what is asked about it.

    Attributes:
        text: its entries.
        asked: a headword and glosses; the first is its own.
    """

    text: str
    asked: list[tuple[str, list[str]]]

    def pairs(self, tokenizer: Tokenizer) -> list[list[EncodedPair]]:
        """Context and continuation of every option."""
        return [[encode_pair(tokenizer, f"{self.text}\n\n{word}:", f" {gloss}") for gloss in glosses]
                for word, glosses in self.asked]


@dataclass(frozen=True)
class Found:
    """What was measured of one bundle at one length."""

    bundle: str
    tokens: int
    questions: int
    found: float
    exact: float
    nats: float
    tokens_per_second: float
    alone: float


def entries(path: Path) -> list[tuple[str, str]]:
    """Headwords of WordNet's nouns, each once, with the first part of its gloss."""
    lines = path.read_text(encoding="utf-8").splitlines()
    found = {match[1]: match[2] for line in lines if (match := _ENTRY.match(line))}
    if len(found) < 1000:
        raise HerdError(f"{path} has {len(found)} entries: give WordNet's data.noun (Debian package wordnet-base)")
    return sorted(found.items())


def document(known: Items[tuple[str, str]], tokenizer: Tokenizer, tokens: int, seed: int) -> Document:
    """A dictionary of at most so many tokens with the question behind it, its glosses dealt out anew."""
    random = np.random.default_rng(seed)
    drawn = [known[place] for place in random.permutation(len(known))[: tokens // 8]]
    words, glosses = [word for word, _ in drawn], [drawn[place][1] for place in random.permutation(len(drawn))]
    lines = [f"{word}: {gloss}" for word, gloss in zip(words, glosses, strict=True)]
    room, kept = tokens - 64, 0
    for line in lines:
        room -= len(tokenizer.encode(f"{line}\n"))
        if room < 0:
            break
        kept += 1
    asked = []
    for place in np.linspace(0, kept - 1, ASKED).astype(int).tolist():
        others = random.choice([other for other in range(kept) if other != place], OPTIONS - 1, replace=False)
        asked.append((words[place], [glosses[place], *(glosses[other] for other in others)]))
    return Document("Dictionary\n\n" + "\n".join(lines[:kept]), asked)


def measure(name: str, engine: Engine, documents: Items[Document], alone: int) -> Found:
    """Ask a bundle about documents of one length."""
    scorer, asked = Scorer(engine), [one.pairs(engine.processor.tokenizer) for one in documents]
    started = time.perf_counter()
    scores = [group for groups in asked for group in scorer.score(groups)]
    seconds = time.perf_counter() - started
    lengths = [[len(gloss) for gloss in glosses] for one in documents for _, glosses in one.asked]
    chosen = [np.argmax([score.total / length for score, length in zip(group, row, strict=True)])
              for group, row in zip(scores, lengths, strict=True)]
    own = [group[0] for group in scores]
    longest = [max(len(pair.token_ids) for group in groups for pair in group) for groups in asked]
    pairs = [group[0] for groups in asked for group in groups]
    return Found(
        name, max(longest), len(scores), statistics.fmean(place == 0 for place in chosen),
        statistics.fmean(score.greedy for score in own),
        -sum(score.total for score in own) / sum(score.tokens for score in own), sum(longest) / seconds,
        _apart(scorer, list(zip(pairs, own, strict=True))[:: max(1, len(own) // max(1, alone))][:alone]))


def _apart(scorer: Scorer, answers: Items[tuple[EncodedPair, LogLikelihood]]) -> float:
    """The largest difference between what was found with a shared past and what a prompt of its own gives."""
    return max((abs(scorer.score([[pair]])[0][0].total - score.total) for pair, score in answers), default=0.0)


def table(rows: Items[Found]) -> Table:
    """A row per bundle and length."""
    shown = Table("bundle", "tokens", "questions", "found", "exact", "nats", "alone", "tokens/s", box=box.MARKDOWN)
    for row in rows:
        shown.add_row(row.bundle, str(row.tokens), str(row.questions), f"{row.found:.1%}", f"{row.exact:.1%}",
                      f"{row.nats:.4f}", f"{row.alone:.1e}", f"{row.tokens_per_second:.0f}")
    return shown


def main() -> None:
    """Parse, ask, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", metavar="NAME=BUNDLE")
    parser.add_argument("--glosses", type=Path, default=Path("/usr/share/wordnet/data.noun"))
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8000])
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--alone", type=int, default=4, help="answers of each length that are computed alone, too")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rows", type=Path, help="where rows are kept as JSON lines")
    options = parser.parse_args()
    known, rows = entries(options.glosses), []
    for name, bundle in named(options.bundles):
        with Engine.load(bundle, threads=options.threads) as engine:
            for tokens in options.lengths:
                stderr.print(f"[dim]{name}, {tokens} tokens[/dim]")
                documents = [document(known, engine.processor.tokenizer, tokens, seed)
                             for seed in range(options.documents)]
                rows.append(measure(name, engine, documents, options.alone))
                if options.rows:
                    with options.rows.open("a") as file:
                        file.write(json.dumps(asdict(rows[-1])) + "\n")
    show_tables(table(rows))


if __name__ == "__main__":
    run_cli(main)
