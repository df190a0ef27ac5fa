"""What a call of the model computes: one token of every answer first, then prompts, as far as the budget goes."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

from .choice import Choice

FEWEST = 32
"""Tokens of a prompt in a call beside answers, however slow the machine is: fewer would waste the call."""
LOGITS_BYTES = 64 << 20
"""Most bytes of logits that a call gives for the log-probabilities of a prompt."""
_WEIGHT = 0.3


@dataclass
class Pace:
    """How long a token of a prompt takes, as measured, so that calls stay short while answers are being read.

    Attributes:
        seconds: per token, a running mean; 0 before the first call.
    """

    seconds: float = 0.0

    def record(self, tokens: int, seconds: float) -> None:
        """Note what a call took."""
        if tokens >= FEWEST:
            each = seconds / tokens
            self.seconds = each if not self.seconds else (1 - _WEIGHT) * self.seconds + _WEIGHT * each

    def budget(self, seconds: float, most: int) -> int:
        """Tokens that a call of so many seconds computes."""
        return most if not self.seconds else max(FEWEST, min(most, int(seconds / self.seconds)))


@dataclass(frozen=True)
class Planner:
    """Divides a call among answers.

    Attributes:
        step_tokens: most tokens of a call.
        step_seconds: that a call may take while answers are being generated.
        attention_chunk: tokens do not cross a multiple of it, 0 for none.
        vocabulary: values of a row of logits.
        pace: what calls took.
    """

    step_tokens: int
    step_seconds: float
    attention_chunk: int
    vocabulary: int
    pace: Pace

    def plan(self, running: Items[Choice], ready_until: dict[Choice, int]) -> list[tuple[Choice, int]]:
        """Answers and how many of their next tokens are computed, the most urgent first.

        Args:
            running: in the order of their urgency.
            ready_until: tokens of a prompt whose pictures were looked at, where not all were.
        """
        decoding = [choice for choice in running if choice.is_decoding]
        planned = [(choice, self._within_chunk(choice, 1 + len(choice.draft))) for choice in decoding]
        used = sum(tokens for _, tokens in planned)
        budget = self.pace.budget(self.step_seconds, self.step_tokens) if decoding else self.step_tokens
        for choice in running:
            if not choice.is_decoding and used < budget:
                end = ready_until.get(choice, len(choice.token_ids))
                tokens = self._piece(choice, min(budget - used, end - choice.seen))
                if tokens > 0:
                    planned.append((choice, tokens))
                    used += tokens
        return planned

    def _piece(self, choice: Choice, tokens: int) -> int:
        if choice.request.prompt_logprobs is not None:
            tokens = min(tokens, max(1, LOGITS_BYTES // (4 * self.vocabulary)))
        return self._within_chunk(choice, tokens)

    def _within_chunk(self, choice: Choice, tokens: int) -> int:
        chunk = self.attention_chunk
        return min(tokens, chunk - choice.seen % chunk) if chunk else tokens

