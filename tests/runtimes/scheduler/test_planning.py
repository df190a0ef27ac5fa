"""What a call computes: answers first, prompts by their urgency, as long as the call may become."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herdgraph.runtimes.scheduler.cost import CallCost, PromptCost
from herdgraph.runtimes.scheduler.planning import FEWEST, Planner


@dataclass(eq=False)
class Stub:
    """As much of an answer in the making as a planner looks at."""

    seen: int
    pending: int
    is_decoding: bool = False
    draft: list[int] = field(default_factory=list)
    request: Any = field(default_factory=lambda: SimpleNamespace(prompt_logprobs=None))

    @property
    def token_ids(self) -> range:
        return range(self.seen + self.pending)


def _planner(tokens: int = 512, slowdown: float = 2.5, chunk: int = 0) -> Planner:
    return Planner(tokens, slowdown, chunk, 1000, CallCost(), PromptCost())


def _answers(count: int) -> list[Any]:
    return [Stub(100 + index, 1, is_decoding=True) for index in range(count)]


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(1, 900), st.booleans()), min_size=1, max_size=12),
       st.integers(20, 300), st.sampled_from([0, 64, 128]))
def test_a_plan_keeps_its_promises(given_: list[tuple[int, int, bool]], tokens: int, chunk: int) -> None:
    running: list[Any] = [Stub(seen, 1 if decoding else pending, decoding) for seen, pending, decoding in given_]
    planned = _planner(tokens, chunk=chunk).plan(running, {})
    assert planned
    assert {id(choice) for choice, _ in planned} >= {id(choice) for choice in running if choice.is_decoding}
    assert sum(count for _, count in planned) <= max(tokens, sum(choice.is_decoding for choice in running))
    for choice, count in planned:
        assert 1 <= count <= choice.pending
        assert not chunk or choice.seen // chunk == (choice.seen + count - 1) // chunk


@pytest.mark.parametrize(("answers", "prompts", "tokens"), [(4, 1, 30), (4, 4, 30), (4, 8, 60), (1, 15, 450)])
def test_calls_beside_answers_become_longer_by_what_waits(answers: int, prompts: int, tokens: int) -> None:
    """A call over answers takes 20 ms, a token of a prompt 1 ms: 30 of them make it 2.5 times as long."""
    planner = _planner()
    planner.record(answers, 0, 0.020)
    planner.record(answers, 100, 0.120)
    running = [*_answers(answers), *(Stub(0, 1000) for _ in range(prompts))]
    planned = planner.plan(running, {})
    assert sum(count for choice, count in planned if not choice.is_decoding) == pytest.approx(tokens, abs=1)


def test_prompts_alone_fill_a_call_and_never_starve() -> None:
    planner = _planner()
    planner.record(0, 512, 5.0)
    assert planner.plan([Stub(0, 1000)], {})[0][1] == 512  # type: ignore[list-item]
    planner.record(2, 0, 0.001)
    planned = planner.plan([*_answers(2), Stub(0, 1000)], {})  # type: ignore[list-item]
    assert planned[-1][1] == FEWEST


def test_guesses_are_verified_and_pictures_waited_for() -> None:
    guessing, waiting = Stub(120, 1, is_decoding=True, draft=[1] * 20), Stub(0, 50)
    planned = _planner(chunk=128).plan([guessing, waiting], {waiting: 7})  # type: ignore[list-item, dict-item]
    assert [count for _, count in planned] == [8, 7]


def test_what_prompts_add_is_learned_by_size() -> None:
    """The first 16 tokens wake all experts and cost 50 ms; every further one costs 1 ms."""
    cost = PromptCost()
    assert (cost.of(100), cost.most(0.1, FEWEST, 512)) == (0.0, 512)
    cost.record(500, 0.534)
    for _ in range(6):  # a long prompt alone says little of a few tokens
        tokens = cost.most(0.060, FEWEST, 512)
        cost.record(tokens, 0.050 + 0.001 * (tokens - 16))
    assert cost.most(0.060, FEWEST, 512) == pytest.approx(26, abs=3)
    assert cost.most(0.001, FEWEST, 512) == FEWEST


def test_one_slow_call_does_not_keep_prompts_small() -> None:
    cost = PromptCost()
    cost.record(40, 10.0)
    cost.record(20, 0.020)
    assert cost.most(0.040, FEWEST, 512) == 40
