"""What a call of the model computes: one token of every answer first, then prompts, as far as the budget goes."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

from .choice import Choice
from .cost import CallCost, PromptCost

FEWEST = 8
"""Tokens of prompts in a call beside answers, however slow the machine is: fewer would waste the call."""
LOGITS_BYTES = 64 << 20
"""Most bytes of logits that a call gives for the log-probabilities of a prompt."""


@dataclass(frozen=True)
class Planner:
    """Divides a call among answers.

    Attributes:
        step_tokens: most tokens of a call.
        slowdown: how many times longer than one without prompts a call may take while answers are being read, where
            no more prompts than answers wait for it.
        attention_chunk: tokens do not cross a multiple of it, 0 for none.
        vocabulary: values of a row of logits.
        calls: what calls without prompts took.
        prompts: what prompts added to calls.
    """

    step_tokens: int
    slowdown: float
    attention_chunk: int
    vocabulary: int
    calls: CallCost
    prompts: PromptCost

    def plan(self, running: Items[Choice], ready_until: dict[Choice, int]) -> list[tuple[Choice, int]]:
        """Answers and how many of their next tokens are computed, the most urgent first.

        Args:
            running: in the order of their urgency.
            ready_until: tokens of a prompt whose pictures were looked at, where not all were.
        """
        planned = [(choice, self._within_chunk(choice, 1 + len(choice.draft)))
                   for choice in running if choice.is_decoding]
        left = self._room_for_prompts(sum(tokens for _, tokens in planned), len(planned), len(running) - len(planned))
        for choice in running:
            if not choice.is_decoding and left > 0:
                end = ready_until.get(choice, len(choice.token_ids))
                tokens = self._piece(choice, min(left, end - choice.seen))
                if tokens > 0:
                    planned.append((choice, tokens))
                    left -= tokens
        return planned

    def record(self, rows: int, prompts: int, seconds: float) -> None:
        """Learn from how long a call over so many rows of answers and tokens of prompts took."""
        if not prompts:
            self.calls.record(rows, seconds)
        else:
            # What the answers alone would take may have been learned while the machine was slower.
            least = seconds * prompts / (rows + prompts) / 2
            self.prompts.record(prompts, max(least, seconds - (self.calls.of(rows) if rows else 0.0)))

    def _room_for_prompts(self, rows: int, answers: int, prompts: int) -> int:
        """Tokens of prompts beside so many rows of answers.

        Whoever waits for a first token counts as much as whoever waits for the next one: where there are more prompts
        than answers, calls may become longer by their ratio.
        """
        most = self.step_tokens - rows
        if not rows or not self.calls.of(rows):
            return most
        longer = (self.slowdown - 1) * max(1.0, prompts / answers)
        return self.prompts.most(longer * self.calls.of(rows), FEWEST, most)

    def _piece(self, choice: Choice, tokens: int) -> int:
        if choice.request.prompt_logprobs is not None:
            tokens = min(tokens, max(1, LOGITS_BYTES // (4 * self.vocabulary)))
        return self._within_chunk(choice, tokens)

    def _within_chunk(self, choice: Choice, tokens: int) -> int:
        chunk = self.attention_chunk
        return min(tokens, chunk - choice.seen % chunk) if chunk else tokens
