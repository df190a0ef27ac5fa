"""Log-likelihoods of continuations, many in a call, nothing computed twice.

The choices of a question share what their tokens have in common: it is computed once, and each choice goes on from a
fork of it. Examples that stand before every question of a task are computed once for all. Tokens of many sequences
lie in one call, as many as fill the matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np

from ...errors import HerdError
from ...model.config import HerdConfig
from ...model.processing import Tokenizer
from ..engine import Engine
from ..executors.runner import PREFILL_CHUNK, Step
from ..kv_cache.sequence import Sequence

MOST_SEQUENCES = 32
"""In a call: each fork owns a cache block of its own at least."""
ROWS_BYTES = 128 << 20
"""Logits of one call."""
WORTH_SHARING = 64
"""Tokens that all questions begin with: for fewer, a copied cache block costs more than it saves."""


class EncodedPair(NamedTuple):
    """A context and its continuation.

    Attributes:
        token_ids: of both.
        first: place of the continuation's first token, at least 1.
    """

    token_ids: list[int]
    first: int


@dataclass
class LogLikelihood:
    """Of a continuation after its context.

    Attributes:
        total: natural logarithm of its probability.
        greedy: whether each of its tokens is the most likely one.
        tokens: that it has.
    """

    total: float = 0.0
    greedy: bool = True
    tokens: int = 0

    def add(self, logprob: float, *, is_best: bool) -> None:
        """Count a token."""
        self.total, self.greedy, self.tokens = self.total + logprob, self.greedy and is_best, self.tokens + 1


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> EncodedPair:
    """Tokens of a context with its continuation, divided as lm-eval divides them.

    Both are read as one text, and the continuation begins where the context alone would end. Blanks at the end of the
    context belong to the continuation, because vocabularies begin words with them. Before an empty context comes the
    token that texts begin with, or else one that ends them.

    Raises:
        HerdError: the continuation has no tokens, or nothing can stand before it.
    """
    blanks = len(context) - len(context.rstrip())
    context, continuation = context[: len(context) - blanks], context[len(context) - blanks :] + continuation
    whole, before = tokenizer.encode_completion(context + continuation), tokenizer.encode_completion(context)
    if not continuation or not whole:
        raise HerdError("a continuation is empty: there is nothing to score")
    if not before:
        before = [first_token(tokenizer)]
        whole = before + whole
    return EncodedPair(whole, min(len(before), len(whole) - 1))


def first_token(tokenizer: Tokenizer) -> int:
    """What stands before a text that has no context.

    Raises:
        HerdError: the vocabulary has no token that begins or ends a text.
    """
    if tokenizer.bos_id is not None:
        return tokenizer.bos_id
    if not tokenizer.stop_ids:
        raise HerdError("the context is empty, and this vocabulary has no token that begins or ends a text")
    return min(tokenizer.stop_ids)


def check_pair(config: HerdConfig, pair: EncodedPair, what: str) -> None:
    """Refuse a pair that the model cannot read.

    Raises:
        HerdError: it has more tokens than the context, or one that the model has no use for.
    """
    text = config.text
    if len(pair.token_ids) > text.max_position_embeddings:
        raise HerdError(f"{what} has {len(pair.token_ids)} tokens, the model's context is "
                        f"{text.max_position_embeddings}: choose another task")
    image = config.image_token_id if config.vision else -1
    wrong = next((token for token in pair.token_ids if not 0 <= token < text.vocab_size or token == image), None)
    if wrong is not None:
        raise HerdError(f"{what} has token {wrong}, which is no text of this model's vocabulary of {text.vocab_size}: "
                        "is it this model's tokenizer?")


Target = list[tuple[LogLikelihood, int]]
"""The tokens whose probabilities a row of logits gives, and where they count."""


@dataclass
class _Span:
    """Tokens to be appended to a sequence.

    Attributes:
        parent: what they follow, forked when the span's turn has come.
        token_ids: at least one.
        targets: of the last of them; the others' logits are not wanted.
        sequence: the fork.
    """

    parent: Sequence
    token_ids: list[int]
    targets: list[Target]
    sequence: Sequence = field(init=False)


class Scorer:
    """Log-likelihoods by an engine, which is used by nobody else meanwhile.

    Args:
        engine: that computes them.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine, self._runner = engine, engine.runner
        self._most_rows = max(16, min(PREFILL_CHUNK, ROWS_BYTES // (4 * engine.config.text.vocab_size)))

    def score(
        self, groups: Items[Items[EncodedPair]], on_group: Callable[[], object] = lambda: None,
    ) -> list[list[LogLikelihood]]:
        """Score groups of pairs, such as the choices of questions.

        Args:
            groups: pairs of a group are likely to begin with the same tokens; all were checked.
            on_group: called after each group, for progress.
        """
        self._runner.require_open()
        found = [[LogLikelihood() for _ in group] for group in groups]
        base = self._examples(groups)
        trees = (_tree(group, scores, len(base)) for group, scores in zip(groups, found, strict=True))
        for wave in self._batches(trees, lambda tree: (len(tree[0]), len(tree[1]))):
            stems = [_Span(base, tokens, targets) for tokens, targets, _ in wave]
            self._run(stems)
            ends = (_Span(stem.sequence, tokens, targets) for stem, (_, _, branches) in zip(stems, wave, strict=True)
                    for tokens, targets in branches)
            for some in self._batches(ends, lambda span: (len(span.token_ids), len(span.targets))):
                self._run(some)
            for _ in wave:
                on_group()
        return found

    def _examples(self, groups: Items[Items[EncodedPair]]) -> Sequence:
        """What all pairs begin with, computed."""
        pairs = [pair for group in groups for pair in group]
        shared = _common([pair.token_ids[: pair.first - 1] for pair in pairs]) if len(groups) > 1 else []
        sequence = self._engine.new_sequence()
        if len(shared) >= WORTH_SHARING:
            self._engine.prefill(sequence, shared)
        return sequence

    def _batches(self, items: Any, cost: Callable[[Any], tuple[int, int]]) -> Iterator[list[Any]]:
        """Items whose tokens and rows fit into one call, at least one at a time."""
        batch: list[Any] = []
        tokens = rows = 0
        for item in items:
            more = cost(item)
            full = tokens + more[0] > PREFILL_CHUNK or rows + more[1] > self._most_rows
            if batch and (full or len(batch) == MOST_SEQUENCES):
                yield batch
                batch, tokens, rows = [], 0, 0
            batch.append(item)
            tokens, rows = tokens + more[0], rows + more[1]
        if batch:
            yield batch

    def _run(self, spans: list[_Span]) -> None:
        """Append all spans, a call for the first part of each, one for the second, and so on."""
        for span in spans:
            span.sequence = span.parent.fork()
        filled = [span for span in spans if span.token_ids]
        for parts in zip_longest(*(self._parts(span) for span in filled)):
            steps: list[Step] = []
            targets: list[Target] = []
            for span, part in zip(filled, parts, strict=True):
                if part is not None:
                    tokens, wanted = part
                    steps.append(Step(span.sequence, tokens, range(len(tokens) if wanted else 0)))
                    targets += wanted
            logits = self._runner.step(steps)
            for row, target in zip(logits, targets, strict=True):
                _count(row, target)

    def _parts(self, span: _Span) -> Iterator[tuple[list[int], list[Target]]]:
        """A span in prefill chunks, those whose logits are wanted no longer than their rows allow."""
        past, first = len(span.sequence), len(span.token_ids) - len(span.targets)
        for chunk in self._runner.chunk_prompt(past, span.token_ids[:first]):
            yield chunk, []
        done = first
        for begin in range(first, len(span.token_ids), self._most_rows):
            piece = span.token_ids[begin : begin + self._most_rows]
            for chunk in self._runner.chunk_prompt(past + begin, piece):
                yield chunk, span.targets[done - first : done - first + len(chunk)]
                done += len(chunk)


Branch = tuple[list[int], list[Target]]


def _tree(
    group: Items[EncodedPair], scores: Items[LogLikelihood], begin: int,
) -> tuple[list[int], list[Target], list[Branch]]:
    """What the pairs of a group have in common behind ``begin``, and where they part; the last tokens are not read."""
    stem = _common([pair.token_ids[:-1] for pair in group])
    end, first = len(stem), min(pair.first for pair in group) - 1
    shared: list[Target] = [[] for _ in stem[first:]]
    branches = []
    for pair, score in zip(group, scores, strict=True):
        rest: list[Target] = []
        for place in range(pair.first - 1, len(pair.token_ids) - 1):
            target = (score, pair.token_ids[place + 1])
            if place < end:
                shared[place - first].append(target)
            else:
                rest.append([target])
        if end < len(pair.token_ids) - 1:
            branches.append((pair.token_ids[end:-1], rest))
    return stem[begin:], shared, branches


def _common(lists: Items[list[int]]) -> list[int]:
    """What all lists begin with: the first and the last one in order differ earliest."""
    low, high = min(lists), max(lists)
    return low[: next((place for place, pair in enumerate(zip(low, high, strict=False)) if pair[0] != pair[1]),
                      min(len(low), len(high)))]


def _count(row_V: np.ndarray[Any, Any], target: Target) -> None:
    """Add the probabilities of tokens by the logits before them."""
    if not target:
        return
    best = int(row_V.argmax())
    highest = float(row_V[best])
    normalizer = highest + float(np.log(np.exp(row_V - row_V[best]).sum(dtype=np.float64)))
    for score, token in target:
        score.add(float(row_V[token]) - normalizer, is_best=token == best)
