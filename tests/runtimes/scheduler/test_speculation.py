"""Speculation changes how many calls an answer takes, never the answer; and it stops where it does not pay."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herdgraph.errors import HerdError
from herdgraph.runtimes import Engine, Sampling
from herdgraph.runtimes.scheduler import DraftModel, PromptLookup, Service
from herdgraph.runtimes.scheduler.choice import Choice
from herdgraph.runtimes.scheduler.cost import CallCost
from herdgraph.runtimes.scheduler.lookup import NGramIndex
from herdgraph.runtimes.scheduler.speculation import Acceptance, Drafter, best_count
from support import herds

from .test_service import alone, request, tokens_of


class HalfRight:
    """Guesses that know the answers, and spoil every third token."""

    seconds = 0.0

    def __init__(self, answers: dict[tuple[int, ...], list[int]]) -> None:
        self.answers = answers

    def guess(self, choices: list[Choice], counts: list[int]) -> list[list[int]]:
        found = []
        for choice in choices:
            answer = self.answers.get(tuple(choice.request.prompt.token_ids), [])[choice.generated :]
            found.append([token if (choice.generated + at) % 3 else 7 for at, token in enumerate(answer[:6])])
        return found


@pytest.fixture
def services(chunked_bundle: Path) -> Iterator[list[Service]]:
    made: list[Service] = []
    yield made
    for service in made:
        service.close()


def _service(services: list[Service], bundle: Path, drafter: Drafter) -> Service:
    services.append(Service(Engine.load(bundle, threads=1, cache_bytes=64 << 20), drafter=drafter))
    return services[-1]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3, "presence_penalty": 0.5}], ids=str)
@pytest.mark.parametrize("drafter", ["lookup", "model", "half right"])
def test_answers_are_the_same_with_and_without(
    drafter: str, sampling: dict[str, float], engine: Engine, chunked_bundle: Path, services: list[Service],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prompts that repeat themselves, over the ends of cache blocks and attention chunks; calls cost what they cost
    where weights are waited for, because on a busy machine guesses may not pay and are not made."""
    monkeypatch.setattr(CallCost, "of", lambda _, rows: 1 + 0.01 * rows)
    prompts = [(herds.tokens(11, seed) * 30)[:length] for seed, length in enumerate((40, 100, 120, 250))]
    wanted = [alone(engine, prompt, 40, **sampling) for prompt in prompts]
    known = {tuple(prompt): said for prompt, said in zip(prompts, wanted, strict=True)}
    made: dict[str, Callable[[], Drafter]] = {
        "lookup": PromptLookup, "half right": lambda: HalfRight(known),
        "model": lambda: DraftModel(Engine.load(chunked_bundle, threads=1), 512)}
    service = _service(services, chunked_bundle, made[drafter]())
    answers = [service.submit(request(prompt, 40, sampling=Sampling(**sampling))) for prompt in prompts]
    assert [tokens_of(answer)[0] for answer in answers] == wanted
    gauges = service.gauges()
    assert gauges["spec_accepted_tokens"] == sum(answer.usage.accepted_tokens for answer in answers)
    assert gauges["spec_accepted_tokens"] <= gauges["spec_draft_tokens"]
    by_place = [gauges[f"spec_accepted_at_{place}"] for place in range(8)]
    assert sum(by_place) == gauges["spec_accepted_tokens"]
    assert by_place == sorted(by_place, reverse=True), "a guess holds where those before it did"
    if drafter == "half right" or (drafter == "model" and not sampling):
        assert gauges["spec_accepted_tokens"] > 20
    # What was guessed wrongly is in nobody's prefix.
    again = service.submit(request(prompts[3] + wanted[3], 20, sampling=Sampling()))
    assert tokens_of(again)[0] == alone(engine, prompts[3] + wanted[3], 20)


def test_a_draft_needs_the_same_vocabulary(engine: Engine) -> None:
    with pytest.raises(HerdError, match="the draft model has a vocabulary of 512, the model has one of 600"):
        DraftModel(engine, 600)


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 5))
def test_lookup_finds_what_followed_the_longest_match(ids: list[int], count: int) -> None:
    index, found = NGramIndex(), []
    for end in range(1, len(ids) + 1):
        found = index.following(ids[:end], count)
    wanted: list[int] = []
    for length in (4, 3, 2):
        ends = [end for end in range(length, len(ids)) if ids[end - length : end] == ids[-length:]]
        if ends and len(ids) >= length:
            wanted = ids[ends[-1] : ends[-1] + count]
            break
    assert found == wanted


def _cost(fixed: float, each: float, rows: tuple[int, ...] = (1, 2, 4, 9)) -> CallCost:
    cost = CallCost()
    for count in rows:
        cost.record(count, fixed + each * count)
    return cost


def test_the_number_of_guesses_is_the_fastest() -> None:
    cheap, dear = _cost(1.0, 0.01), _cost(0.1, 1.0)
    assert cheap.of(3) == pytest.approx(1.03)
    assert best_count(0.9, 1, cheap, 0.0, 8) == 8
    assert best_count(0.05, 1, cheap, 0.0, 8) <= 2
    assert best_count(0.9, 1, dear, 0.0, 8) == 0
    assert best_count(0.9, 1, cheap, 2.0, 8) == 0, "guesses that take two calls each"
    assert best_count(0.9, 1, CallCost(), 0.0, 8) == 0


@pytest.mark.parametrize("share", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("each", [0.02, 0.3, 0.9])
def test_what_is_tried_settles_on_what_is_fastest(share: float, each: float) -> None:
    """Calls of which each one is chosen by what the ones before took, until nothing changes."""
    cost, true = CallCost(), _cost(1.0, each, tuple(range(1, 10)))
    for _ in range(60):
        rows = 1 + best_count(share, 1, cost, 0.0, 8)
        cost.record(rows, 1.0 + each * rows)
    found, best = (best_count(share, 1, one, 0.0, 8) for one in (cost, true))
    speeds = [sum(share**index for index in range(count + 1)) / true.of(1 + count) for count in (found, best)]
    assert speeds[0] >= 0.9 * speeds[1]


def test_guesses_that_never_hold_end_and_are_tried_again() -> None:
    acceptance, cost = Acceptance(), _cost(1.0, 0.5)
    assert best_count(acceptance.share, 1, cost, 0.0, 8) > 0
    for _ in range(40):
        acceptance.record(2, 0)
    assert best_count(acceptance.share, 1, cost, 0.0, 8) == 0
    for _ in range(60):
        acceptance.record(0, 0)
    assert best_count(acceptance.share, 1, cost, 0.0, 8) > 0
