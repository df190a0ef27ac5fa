"""Grammars compiled for one tokenizer, and kept."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from ....errors import HerdError
from ....model.processing import Tokenizer
from ..tools.formats import with_markers
from .constraint import TokenConstraint, first_line
from .masks import Masks
from .spec import GrammarSpec
from .vocabulary import grammar_vocabulary

MOST_KEPT = 256
"""Compiled grammars kept; each takes some hundred kilobytes."""
_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,20}"
"""Between the parts of JSON. Without a bound a model may write blanks until its tokens are spent."""
_LIMITS = LLParserLimits(max_items_in_row=10_000, step_max_items=100_000, initial_lexer_fuel=2_000_000,
                         step_lexer_fuel=500_000, max_lexer_states=100_000, verbose_errors=False)
_LIMITS_OF_STRANGERS = LLParserLimits(max_items_in_row=1000, step_max_items=20_000, initial_lexer_fuel=2_000_000,
                                      step_lexer_fuel=500_000, max_lexer_states=100_000, verbose_errors=False)
"""A Lark grammar can be as ambiguous as its author likes: it ends with an error before a token costs some 20 ms."""


class Grammars:
    """Compiles grammars; may be used by many threads.

    The library's own vocabulary is built in a thread, beginning now; the first ``compile`` waits for it.

    Args:
        tokenizer: the checkpoint's.
        vocab_size: that of the model's logits.
        stop_ids: tokens that end an answer.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: Iterable[int]) -> None:
        self._stop_ids = frozenset(stop_ids)
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="grammar")
        self._vocabulary = self._threads.submit(grammar_vocabulary, tokenizer, vocab_size, self._stop_ids)
        self._masks = Masks(max(vocab_size, tokenizer.vocab_size), self._threads)
        self._markers = tuple(tokenizer.token_to_id(token) for token in ("<|python_start|>", "<|python_end|>"))
        self._kept: OrderedDict[bytes, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, spec: GrammarSpec) -> TokenConstraint:
        """A constraint before its first token.

        Takes about a millisecond, for a hundred tools some ten: call it beside the event loop.

        Raises:
            HerdError: the form cannot be enforced, with the library's reason.
        """
        with self._lock:
            matcher = self._kept.get(spec.digest)
        if matcher is None:
            matcher = self._compiled(spec, self._vocabulary.result())
        with self._lock:
            self._kept[spec.digest] = matcher
            self._kept.move_to_end(spec.digest)
            while len(self._kept) > MOST_KEPT:
                self._kept.popitem(last=False)
            own = matcher.deep_copy()
        return TokenConstraint(own, self._masks, self._stop_ids)

    def close(self) -> None:
        """Let the threads go."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _compiled(self, spec: GrammarSpec, vocabulary: LLTokenizer) -> LLMatcher:
        limits = _LIMITS_OF_STRANGERS if spec.kind == "lark" else _LIMITS
        matcher = LLMatcher(vocabulary, self._grammar(spec), log_level=0, limits=limits)
        matcher.compute_bitmask()  # the first one is slow, and shows what is too complex from the beginning
        if matcher.is_error():
            reason = first_line(matcher.get_error())
            if spec.kind == "tools":  # nobody wrote this grammar: places in it say nothing
                reason = reason.rpartition("failed to compile JSON schema: ")[2]
            raise HerdError(f"the answer's form cannot be enforced: {reason}")
        return matcher

    def _grammar(self, spec: GrammarSpec) -> str:
        if spec.kind == "json":
            # A schema could ask for other options as "x-guidance", which would turn its enforcement off.
            return LLMatcher.grammar_from_json_schema(spec.text, overrides={
                "lenient": False, "coerce_one_of": False, "item_separator": ",", "key_separator": ":",
                "whitespace_pattern": _WHITESPACE})
        if spec.kind == "regex":
            return LLMatcher.grammar_from_regex(spec.text)
        text = with_markers(spec.text, *self._markers) if spec.kind == "tools" else spec.text
        return LLMatcher.grammar_from_lark(text)
