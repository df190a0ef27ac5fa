"""A request's fields to the engine's: how tokens are chosen, and when an answer ends."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from ...errors import HerdError
from ...model.processing import GenerationDefaults, Tokenizer
from ..generation import Sampling, StopRule
from .errors import of_herd_error, wrong
from .protocol.common import SamplingBody

_MOST_BIASES = 4096
_LONGEST_STOP = 1000


def sampling_of(
    body: SamplingBody, defaults: GenerationDefaults, tokenizer: Tokenizer, vocabulary: int, logprobs: int | None
) -> Sampling:
    """How tokens are chosen; what the request leaves open is as the checkpoint's authors recommend.

    Args:
        body: the request.
        defaults: of the checkpoint; where they know no temperature it is 1, as OpenAI's is.
        tokenizer: for texts that may not be said.
        vocabulary: size of the model's.
        logprobs: alternatives to report, None for no log-probabilities.

    Raises:
        ApiError: a value is out of its range.
    """
    if defaults.temperature is None:
        defaults = replace(defaults, temperature=1.0)
    options: dict[str, Any] = {
        "temperature": body.temperature, "top_p": body.top_p, "min_p": body.min_p,
        "top_k": 0 if body.top_k == -1 else body.top_k, "repetition_penalty": body.repetition_penalty,
        "presence_penalty": body.presence_penalty, "frequency_penalty": body.frequency_penalty,
        "logit_bias": _bias(body.logit_bias or {}, vocabulary),
        "allowed_token_ids": _allowed(body.allowed_token_ids, vocabulary),
        "bad_words": _bad_words(body.bad_words or [], tokenizer),
        "seed": None if body.seed is None else body.seed % (1 << 64), "logprobs": logprobs}
    try:
        return Sampling.of(defaults, **options)
    except HerdError as error:
        named = str(error).split(" ")[0]
        raise of_herd_error(error, named if named in options else None) from error


def stop_rule_of(body: SamplingBody, tokenizer: Tokenizer, vocabulary: int, most_tokens: int) -> StopRule:
    """When an answer ends.

    Raises:
        ApiError: a stop string is empty or too long, a token is unknown, or the least length is above the most.
    """
    require_known(body.stop_token_ids or (), vocabulary, "stop_token_ids")
    strings = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if any(not 0 < len(string) <= _LONGEST_STOP for string in strings):
        raise wrong(f"a stop string is empty or has more than {_LONGEST_STOP} characters", "stop")
    least = body.min_tokens or 0
    if least > most_tokens:
        raise wrong(f"min_tokens is {least}, the answer has at most {most_tokens}", "min_tokens")
    ids = {*(body.stop_token_ids or ()), *(() if body.ignore_eos else tokenizer.stop_ids)}
    return StopRule(most_tokens, frozenset(ids), tuple(strings), least, bool(body.include_stop_str_in_output))


def room_for(prompt_tokens: int, asked: int | None, context: int, param: str = "max_tokens") -> int:
    """How many tokens an answer may have: what was asked for, or all that is left of the context.

    Raises:
        ApiError: prompt and answer do not fit.
    """
    left = context - prompt_tokens
    if left < 1 or (asked or 0) > left:
        wanted = f" and {asked} of the answer" if asked else ""
        raise wrong(f"this model's context is {context} tokens, the request has {prompt_tokens} of the prompt{wanted}: "
                    f"shorten the prompt or {param}", param if left > 0 else "messages", "context_length_exceeded")
    return left if asked is None else max(asked, 1)


def require_known(ids: Iterable[int], vocabulary: int, param: str) -> None:
    """Refuse token ids that the model does not have.

    Raises:
        ApiError: one is outside of the vocabulary.
    """
    for token in ids:
        if not 0 <= token < vocabulary:
            raise wrong(f"{param} has token id {token}, the vocabulary has {vocabulary}", param)


def _bias(given: dict[str, float], vocabulary: int) -> dict[int, float]:
    if len(given) > _MOST_BIASES:
        raise wrong(f"logit_bias has {len(given)} tokens, at most {_MOST_BIASES} are taken", "logit_bias")
    biases = {}
    for text, bias in given.items():
        if not (text.isascii() and text.isdecimal() and len(text) < 10) or not -100 <= bias <= 100:
            raise wrong("logit_bias maps token ids to numbers within -100 and 100", "logit_bias")
        biases[int(text)] = bias
    require_known(biases, vocabulary, "logit_bias")
    return biases


def _allowed(given: list[int] | None, vocabulary: int) -> tuple[int, ...] | None:
    if given is None:
        return None
    if not given:
        raise wrong("allowed_token_ids is empty, so that nothing may be said", "allowed_token_ids")
    require_known(given, vocabulary, "allowed_token_ids")
    return tuple(sorted(set(given)))


def _bad_words(words: list[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Each word as it begins an answer, and as it follows another: vocabularies spell the two differently."""
    if any(not word for word in words):
        raise wrong("bad_words has an empty text", "bad_words")
    spelt = [tokenizer.encode(text) for word in words for text in (word, " " + word.lstrip())]
    return tuple(dict.fromkeys(map(tuple, spelt)))
