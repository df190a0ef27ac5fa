"""Our tokenizer as llguidance wants it."""

from __future__ import annotations

from collections.abc import Iterable

import tiktoken
from llguidance import LLTokenizer
from llguidance.tiktoken import lltokenizer_from_encoding

from ....errors import HerdError
from ....model.processing import Tokenizer


def grammar_vocabulary(tokenizer: Tokenizer, vocab_size: int, stop_ids: Iterable[int]) -> LLTokenizer:
    """All tokens by their bytes; a second's work for the vocabulary of Llama 4.

    Args:
        tokenizer: the checkpoint's.
        vocab_size: that of the model, which may have more ids than the tokenizer.
        stop_ids: tokens that end an answer.

    Raises:
        HerdError: nothing ends an answer, or the library cannot read this kind of tokenizer.
    """
    ends, size = sorted(stop_ids), max(vocab_size, tokenizer.vocab_size)
    if not ends:
        raise HerdError("the model has no token that ends an answer, which a grammar needs: add eos_token_id to "
                        "generation_config.json")
    library = tokenizer.library
    try:
        if isinstance(library, tiktoken.Encoding):
            return lltokenizer_from_encoding(library, n_vocab=size, eos_token=ends)
        return LLTokenizer(library.to_str(), n_vocab=size, eos_token=ends)
    except Exception as error:  # whatever the library finds wrong
        raise HerdError(f"llguidance cannot read this tokenizer, so that no answer can be constrained: {error}") \
            from error
