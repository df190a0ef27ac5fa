"""Log-probabilities as OpenAI's two APIs tell them. They are the model's, before temperature, filters and grammars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..generation import TokenLogprob
from ..generation.sampling import Candidate

_LEAST = -9999.0
"""In the place of minus infinity, which JSON does not have."""


def chat_logprobs(entries: Sequence[TokenLogprob], *, as_ids: bool) -> dict[str, Any]:
    """Of a chat's answer: one object per token."""
    content = [_entry(entry, as_ids) | {"top_logprobs": [_entry(other, as_ids) for other in entry.top]}
               for entry in entries]
    return {"content": content, "refusal": None}


def _entry(candidate: Candidate, as_ids: bool) -> dict[str, Any]:
    text = candidate.text
    # A token may end inside a character, and its text does not say which bytes it has.
    known = None if "\N{REPLACEMENT CHARACTER}" in text else list(text.encode("utf-8", "replace"))
    return {"token": _name(candidate, as_ids), "logprob": finite(candidate.logprob), "bytes": known}


class CompletionLogprobs:
    """Of a completion: four lists side by side.

    Args:
        as_ids: tokens are called ``token_id:5`` in the place of their texts.
    """

    def __init__(self, *, as_ids: bool) -> None:
        self._as_ids, self._offset = as_ids, 0

    def of(self, entries: Sequence[TokenLogprob | None], first: str = "") -> dict[str, Any]:
        """The lists of further tokens.

        Args:
            entries: None for a prompt's first token, which nothing predicts.
            first: its text.
        """
        lists: dict[str, Any] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        for entry in entries:
            lists["text_offset"].append(self._offset)
            self._offset += len(first if entry is None else entry.text)
            lists["tokens"].append(first if entry is None else _name(entry, self._as_ids))
            lists["token_logprobs"].append(None if entry is None else finite(entry.logprob))
            lists["top_logprobs"].append(None if entry is None else self._top(entry))
        return lists

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """By text; of tokens with one text the likeliest, and always the one that was chosen."""
        top: dict[str, float] = {}
        for candidate in (*entry.top, entry):
            top.setdefault(_name(candidate, self._as_ids), finite(candidate.logprob))
        return top


def prompt_logprobs(entries: Sequence[TokenLogprob | None]) -> list[dict[str, Any] | None]:
    """In vLLM's form: by token id, with rank and text; the rank of a token below the ``top`` is null."""
    told: list[dict[str, Any] | None] = []
    for entry in entries:
        if entry is None:
            told.append(None)
            continue
        ranked = [*enumerate(entry.top, 1)]
        found = {str(one.token_id): _ranked(one, rank) for rank, one in ranked}
        told.append({str(entry.token_id): _ranked(entry, None), **found})
    return told


def _ranked(candidate: Candidate, rank: int | None) -> dict[str, Any]:
    return {"logprob": finite(candidate.logprob), "rank": rank, "decoded_token": candidate.text}


def finite(logprob: float) -> float:
    """A number that JSON has."""
    return max(logprob, _LEAST)


def _name(candidate: Candidate, as_ids: bool) -> str:
    return f"token_id:{candidate.token_id}" if as_ids else candidate.text
