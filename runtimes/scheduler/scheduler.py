"""Continuous batching: which answers run, what each call computes, who has to wait when memory is short.

Every call of the model takes one token of each answer in the making and as many tokens of prompts as fit beside them.
A request's keys and values live in cache blocks; what it computed is found again by whoever begins alike
(``kv_cache/prefix_cache.py``). When blocks run out, the least urgent answer gives its own back and is computed again
later, mostly from the prefix cache: nothing that was begun is ever given up.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Items

from ...errors import HerdError
from ..engine import Engine
from ..executors.runner import Row, Step
from ..executors.vision import TILES_PER_CALL
from ..kv_cache.prefix_cache import PrefixCache
from ..kv_cache.sequence import Sequence
from .active import ActiveRequest
from .choice import Choice, rows_of
from .cost import CallCost, PromptCost
from .memory import CacheRoom
from .planning import Planner
from .request import RequestError
from .speculation import Drafter, Speculation


class Scheduler:
    """Runs requests on an engine, step by step, in one thread.

    Args:
        engine: loaded.
        sequences: most answers in the making.
        step_tokens: most tokens in one call.
        slowdown: how many times longer than one without prompts a call may take while answers are being read.
        drafter: guesses next tokens, None for no guesses.

    Attributes:
        running: answers in the making.
        preemptions: how often one had to give its memory back.
        deferred: answers that wait for a block that another one is computing.
    """

    def __init__(
        self, engine: Engine, *, sequences: int, step_tokens: int, slowdown: float, drafter: Drafter | None = None
    ) -> None:
        self._runner, self._vision, config = engine.runner, engine.vision, engine.config
        self._sequences, calls = sequences, CallCost()
        self.speculation = None if drafter is None else Speculation(drafter, calls)
        self.running: list[Choice] = []
        self._waiting: list[Choice] = []
        self._requests: dict[Choice, ActiveRequest] = {}
        self.room = CacheRoom.of(self._runner)
        self._runner.warm_up(sequences)
        self._planner = Planner(step_tokens, slowdown, self._runner.attention_chunk, config.text.vocab_size, calls,
                                PromptCost())
        self.preemptions = self.deferred = 0

    # -- who is there ----------------------------------------------------------------------------------------------

    @property
    def prefixes(self) -> PrefixCache | None:
        """Blocks of earlier prompts and answers, where the executor shares blocks."""
        return self.room.prefixes

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has something to do."""
        return bool(self.running or self._waiting)

    @property
    def requests(self) -> list[ActiveRequest]:
        """All that have not ended."""
        return list(dict.fromkeys(self._requests.values()))

    def add(self, active: ActiveRequest) -> None:
        """Take a request."""
        self._requests[active.choices[0]] = active
        self._waiting.append(active.choices[0])

    def fail(self, active: ActiveRequest, reason: str, *, request_is_wrong: bool = False) -> None:
        """End a request for a reason that its reader is told."""
        active.fail(reason, request_is_wrong=request_is_wrong)
        self._forget_ended()

    # -- one call --------------------------------------------------------------------------------------------------

    def step(self) -> int:
        """Compute one call of the model, or some tiles of a picture; the number of tokens of the call."""
        self._drop_cancelled()
        self._admit()
        self._look_at_pictures()
        if self.speculation is not None:
            self.speculation.draft([choice for choice in self.running if choice.is_decoding])
        planned = self._with_room(self._planner.plan(self.running, self._ready_until()))
        if planned:
            self._run(planned)
        self._forget_ended()
        return sum(tokens for _, tokens in planned)

    def _drop_cancelled(self) -> None:
        for active in self.requests:
            if active.cancelled:
                active.fail("the request was cancelled")
        self._forget_ended()

    def _forget_ended(self) -> None:
        for choice in [choice for choice in self._requests if choice.finish_reason]:
            self._keep_for_others(choice)
            choice.release()
            del self._requests[choice]
        self.running = [choice for choice in self.running if choice in self._requests]
        self._waiting = [choice for choice in self._waiting if choice in self._requests]

    def _admit(self) -> None:
        """Let waiting answers begin, the most urgent first, while there is room for them.

        Who needs a block next that another one is computing right now waits for it, and takes it over.
        """
        self._waiting.sort(key=self._urgency)
        deferred = 0
        for choice in list(self._waiting):
            if not self._has_place(choice):
                break
            if self._is_being_computed(choice):
                deferred += 1
            elif not self._begin(choice):
                break
        self.deferred = deferred
        self.running.sort(key=self._urgency)

    def _begin(self, choice: Choice) -> bool:
        """Give an answer a sequence with what is known of its tokens; False where there is no memory for the rest."""
        sequence, cached = self._begun(choice)
        if self.running and not self.room.has(sequence, choice.pending - cached, spare=len(self.running)):
            sequence.truncate(0)
            return False
        choice.sequence, choice.published = sequence, self.room.blocks(cached)
        self._requests[choice].begin(cached)
        if self.prefixes is not None:
            self.prefixes.count(len(choice.token_ids), cached)
        self._waiting.remove(choice)
        self.running.append(choice)
        return True

    def _is_being_computed(self, choice: Choice) -> bool:
        """Whether the next block that an answer needs belongs to a prompt that is being computed."""
        if self.prefixes is None or choice.request.prompt_logprobs is not None:
            return False
        keys = choice.keys.keys
        known = self.prefixes.blocks(keys, len(choice.token_ids))
        return known < len(keys) and any(
            keys[known] in other.keys.keys[other.published :] for other in self.running if not other.is_decoding)

    def _has_place(self, choice: Choice) -> bool:
        """Whether an answer, and those that begin as its copies, are not too many at the same time."""
        active = self._requests[choice]
        twins = active.request.choices - len(active.choices)
        return len(self.running) + 1 + twins <= self._sequences

    def _urgency(self, choice: Choice) -> float:
        return self._requests[choice].urgency

    def _begun(self, choice: Choice) -> tuple[Sequence, int]:
        """A sequence that begins with what is known of an answer's tokens, and how many tokens that is."""
        prefixes = self.prefixes
        if prefixes is None or (choice.request.prompt_logprobs is not None and not choice.generated):
            return self._runner.new_sequence(), 0
        cache, cached = prefixes.take(choice.keys.keys, len(choice.token_ids))
        return Sequence(cache, self._runner.config.text.hidden_size, choice.token_ids[:cached]), cached

    # -- pictures --------------------------------------------------------------------------------------------------

    def _look_at_pictures(self) -> None:
        """Compute some tiles of the most urgent picture: one tile where answers are waiting for their next token."""
        if self._vision is None:
            return
        for choice in self.running:
            pictures = self._requests[choice].pictures
            if pictures.missing(choice.seen) is not None:
                busy = any(other.is_decoding for other in self.running)
                try:
                    pictures.compute(self._vision, choice.seen, 1 if busy else TILES_PER_CALL)
                except HerdError as error:
                    self.fail(self._requests[choice], str(error))
                return

    def _ready_until(self) -> dict[Choice, int]:
        """Where prompts have to wait for pictures."""
        ends = {choice: self._requests[choice].pictures.end_of_known(choice.seen, len(choice.token_ids))
                for choice in self.running if not choice.is_decoding}
        return {choice: end for choice, end in ends.items() if end < len(choice.token_ids)}

    # -- memory ----------------------------------------------------------------------------------------------------

    def _with_room(self, planned: list[tuple[Choice, int]]) -> list[tuple[Choice, int]]:
        """The plan without those that had to give their memory to more urgent ones."""
        while not self.room.make((choice.sequence, tokens) for choice, tokens in planned):
            victim = max(self.running, key=self._urgency)
            if len(self.running) == 1:
                self.fail(self._requests[victim], "other users of the engine hold the memory of keys and values")
            else:
                self._preempt(victim)
            planned = [(choice, tokens) for choice, tokens in planned if choice is not victim]
        return planned

    def _preempt(self, choice: Choice) -> None:
        self._keep_for_others(choice)
        choice.release()
        self.running.remove(choice)
        self._waiting.append(choice)
        self.preemptions += 1
        self._requests[choice].answer.usage.preemptions += 1

    def _keep_for_others(self, choice: Choice) -> None:
        if self.prefixes is not None and choice.sequence is not None:
            self.prefixes.touch(choice.keys.keys[: choice.published])

    def _publish(self, choice: Choice) -> None:
        """Let others use the blocks that a call has filled."""
        if self.prefixes is None or choice.sequence is None:
            return
        choice.keys.extend(choice.token_ids[: choice.seen])
        full = self.room.blocks(choice.seen)
        if full > choice.published:
            self.prefixes.publish(choice.keys.keys[:full], choice.sequence.cache, choice.published)
            choice.published = full

    # -- the call itself -------------------------------------------------------------------------------------------

    def _run(self, planned: Items[tuple[Choice, int]]) -> None:
        steps = [self._step_of(choice, tokens) for choice, tokens in planned]
        first_pending = [choice.seen for choice, _ in planned]
        answers = sum(tokens for choice, tokens in planned if choice.is_decoding)
        for (choice, _), step in zip(planned, steps, strict=True):
            if step.rows:
                choice.prepare()
        started = time.perf_counter()
        rows = self._runner.rows(steps)
        prompts = sum(tokens for _, tokens in planned) - answers
        self._planner.record(answers, prompts, time.perf_counter() - started)
        row = 0
        for (choice, _), step, first in zip(planned, steps, first_pending, strict=True):
            if choice in self._requests:  # another answer to the same request may have failed just now
                self._take(choice, rows[row : row + len(step.rows)], first)
                self._publish(choice)
            row += len(step.rows)

    def _step_of(self, choice: Choice, tokens: int) -> Step:
        assert choice.sequence is not None, "a running answer has a sequence"
        first, end = choice.seen, choice.seen + tokens
        features = self._requests[choice].pictures.of(first, end)
        return Step(choice.sequence, (choice.token_ids + choice.draft)[first:end], rows_of(choice, tokens), features,
                    choice.takes_best, choice.request.never)

    def _take(self, choice: Choice, rows: Items[Row], first: int) -> None:
        """Go on with an answer after a call.

        Args:
            choice: whose tokens from ``first`` on were computed.
            rows: those that it asked for.
            first: place of its first token.
        """
        active = self._requests[choice]
        try:
            if choice.request.prompt_logprobs is not None and not choice.generated:
                answer = active.answer
                answer.prompt_logprobs += ([] if first else [None]) + choice.prompt_logprobs(rows, first)
            if choice.draft:
                self._verify(active, choice, rows)
            elif not choice.pending:
                self._choose(active, choice, rows[-1])
        except HerdError as error:
            self.fail(active, str(error), request_is_wrong=isinstance(error, RequestError))

    def _verify(self, active: ActiveRequest, choice: Choice, rows: Items[Row]) -> None:
        """Go on while what is chosen is what was guessed; the model forgets the other guesses."""
        assert choice.sequence is not None, "a running answer has a sequence"
        assert self.speculation is not None, "it made the guesses"
        guesses, held = choice.draft[: len(rows) - 1], 0
        for row, guess in zip(rows, [*guesses, None], strict=True):
            active.put(choice.accept(row))
            if choice.finish_reason or choice.token_ids[-1] != guess:
                break
            held += 1
        choice.draft = []
        choice.sequence.truncate(len(choice.token_ids) - 1)
        self.speculation.record(choice, len(guesses), held)
        active.answer.usage.accepted_tokens += held

    def _choose(self, active: ActiveRequest, choice: Choice, row: Row) -> None:
        begun = [choice]
        if not choice.generated and len(active.choices) < active.request.choices:
            twins = active.fork()
            self._requests |= dict.fromkeys(twins, active)
            self.running += twins
            begun += twins
        for one in begun:
            active.put(one.accept(row))

