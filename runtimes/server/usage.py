"""What a request has cost, as each API tells it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..scheduler import Usage


def openai_usage(usages: Iterable[Usage]) -> dict[str, Any]:
    """Of chats and completions; ``cached_tokens`` are those of the prompt that were not computed again."""
    listed = list(usages)
    prompt, completion = (sum(getattr(usage, name) for usage in listed)
                          for name in ("prompt_tokens", "completion_tokens"))
    return {
        "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in listed)},
        "completion_tokens_details": {"accepted_prediction_tokens": sum(usage.accepted_tokens for usage in listed)}}


def responses_usage(usage: Usage) -> dict[str, Any]:
    """Of ``/v1/responses``."""
    return {
        "input_tokens": usage.prompt_tokens, "output_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens_details": {"reasoning_tokens": 0}}


def anthropic_usage(usage: Usage) -> dict[str, int]:
    """Of ``/v1/messages``, which counts cached tokens apart."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens, "output_tokens": usage.completion_tokens,
        "cache_read_input_tokens": usage.cached_tokens, "cache_creation_input_tokens": 0}
