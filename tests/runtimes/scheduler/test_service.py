"""The service: answers are the same alone and in company, whatever memory, pictures and neighbours do."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np
import pytest
from PIL import Image

from herdgraph.errors import HerdError
from herdgraph.model.processing import PreparedPrompt
from herdgraph.runtimes import Engine, Sampling
from herdgraph.runtimes.generation import StopRule
from herdgraph.runtimes.generation.penalties import Penalties
from herdgraph.runtimes.generation.sampling import Sampler
from herdgraph.runtimes.scheduler import Answer, GenerationRequest, OverloadedError, Service
from support import herds

from .conftest import StartService

CHUNK = 128


def request(prompt: list[int] | PreparedPrompt, new: int = 12, **options: Any) -> GenerationRequest:
    prepared = PreparedPrompt(prompt) if isinstance(prompt, list) else prompt
    sampling = options.pop("sampling", Sampling())
    return GenerationRequest(request_id="r", prompt=prepared, sampling=sampling,
                             stop=options.pop("stop", StopRule(new)), never=(500,), **options)


def tokens_of(answer: Answer) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for delta in answer:
        assert delta.finish_reason != "error", delta.error
        found.setdefault(delta.choice, []).extend(delta.token_ids)
    return found


def alone(engine: Engine, prompt: list[int] | PreparedPrompt, new: int = 12, **sampling: Any) -> list[int]:
    ids = prompt if isinstance(prompt, list) else prompt.token_ids
    pixels = None if isinstance(prompt, list) else prompt.pixel_values
    sequence = engine.new_sequence()
    logits = engine.prefill(sequence, ids, pixels)
    found: list[int] = []
    sampler, penalties = Sampler(Sampling(**sampling)), Penalties(Sampling(**sampling), ids, [500])
    while len(found) < new:
        found.append(sampler(penalties.apply(logits)))
        penalties.count(found[-1])
        logits = engine.decode(sequence, found[-1])
    return found


LENGTHS = (1, 5, 63, 64, 65, 130, 200, 300)


@pytest.mark.parametrize("options", [{}, {"step_tokens": 40}, {"slowdown": 1.0}, {"sequences": 3}], ids=str)
def test_greedy_tokens_are_the_same_alone_and_in_company(
    options: dict[str, Any], engine: Engine, start: StartService
) -> None:
    service = start(**options)
    prompts = [herds.tokens(length, seed) for seed, length in enumerate(LENGTHS)]
    answers = [service.submit(request(prompt)) for prompt in prompts]
    assert [tokens_of(answer)[0] for answer in answers] == [alone(engine, prompt) for prompt in prompts]
    assert service.gauges()["running"] == 0


def test_drawn_tokens_are_the_same_alone_and_in_company(engine: Engine, start: StartService) -> None:
    service = start()
    prompt = herds.tokens(70)
    sampling = {"temperature": 1.0, "presence_penalty": 1.0, "repetition_penalty": 1.2}
    company = [service.submit(request(herds.tokens(20, seed), sampling=Sampling(temperature=1.0, seed=seed)))
               for seed in range(4)]
    several = tokens_of(service.submit(request(prompt, choices=3, sampling=Sampling(seed=7, **sampling))))
    assert [several[index] for index in range(3)] == [alone(engine, prompt, seed=7 + index, **sampling)
                                                      for index in range(3)]
    for answer in company:
        tokens_of(answer)


@pytest.mark.parametrize(("length", "cached"), [(64, 0), (65, 64), (127, 64), (128, 64), (129, 128), (193, 192),
                                                (256, 192), (257, 256), (300, 256)])
def test_a_prompt_that_comes_again_is_taken_from_the_prefix_cache(
    length: int, cached: int, engine: Engine, start: StartService
) -> None:
    service, prompt = start(), herds.tokens(length)
    wanted = alone(engine, prompt)
    assert tokens_of(service.submit(request(prompt)))[0] == wanted
    second = service.submit(request(prompt))
    assert tokens_of(second)[0] == wanted
    assert second.usage.cached_tokens == cached


def test_an_answer_is_the_prefix_of_the_next_turn(engine: Engine, start: StartService) -> None:
    service, prompt = start(), herds.tokens(100)
    said = tokens_of(service.submit(request(prompt, 60)))[0]
    turn = prompt + said + herds.tokens(9, 1)
    answer = service.submit(request(turn))
    assert tokens_of(answer)[0] == alone(engine, turn)
    assert answer.usage.cached_tokens == 128  # 159 tokens were computed: two full blocks


def test_a_beginning_that_many_ask_at_once_is_computed_once(engine: Engine, start: StartService) -> None:
    service, common = start(step_tokens=64), herds.tokens(300)
    prompts = [common + herds.tokens(20 + seed, seed + 1) for seed in range(5)]
    answers = [service.submit(request(prompt)) for prompt in prompts]
    assert [tokens_of(answer)[0] for answer in answers] == [alone(engine, prompt) for prompt in prompts]
    assert sorted(answer.usage.cached_tokens for answer in answers) == [0, 256, 256, 256, 256]


def test_what_calls_compute_and_why_requests_wait_is_counted(start: StartService) -> None:
    service, common = start(step_tokens=16), herds.tokens(300)
    calls, gauges = list[int](), list[dict[str, float]]()

    def see(tokens: int) -> None:
        calls.append(tokens)
        gauges.append(service.gauges())

    service.on_step = see
    answers = [service.submit(request([*common, last])) for last in (5, 6)]
    generated = [len(tokens_of(answer)[0]) for answer in answers]
    cached = sum(answer.usage.cached_tokens for answer in answers)
    service.close()
    assert sum(calls) == 2 * 301 - cached + sum(generated) - 2  # the first tokens come from the prompts' calls
    assert max(seen["waiting_deferred"] for seen in gauges) == 1
    assert all(seen["waiting_capacity"] + seen["waiting_deferred"] == seen["waiting"] for seen in gauges)


def test_who_waits_for_a_beginning_goes_on_when_its_owner_leaves(engine: Engine, start: StartService) -> None:
    service, common = start(step_tokens=16), herds.tokens(600)
    first = service.submit(request(common))
    second = service.submit(request([*common, 5]))
    first.cancel()
    assert tokens_of(second)[0] == alone(engine, [*common, 5])


def test_tenants_share_nothing(start: StartService) -> None:
    service, prompt = start(), herds.tokens(200)
    for salt, cached in ((b"a", 0), (b"b", 0), (b"a", 192)):
        answer = service.submit(request(prompt, salt=salt))
        tokens_of(answer)
        assert answer.usage.cached_tokens == cached


def test_nothing_is_given_up_when_memory_is_short(engine: Engine, start: StartService) -> None:
    """Eight answers with memory for three: some give theirs back and are computed again."""
    service = start(cache_bytes=3 * _bytes_of(engine, 5))
    prompts = [herds.tokens(150 + 10 * seed, seed) for seed in range(8)]
    answers = [service.submit(request(prompt, 80)) for prompt in prompts]
    assert [tokens_of(answer)[0] for answer in answers] == [alone(engine, prompt, 80) for prompt in prompts]
    assert service.gauges()["preemptions"] == sum(answer.usage.preemptions for answer in answers) > 0
    assert service.gauges()["kv_cache_usage"] == 0


def _bytes_of(engine: Engine, blocks: int) -> int:
    pools = engine.runner.pools  # type: ignore[attr-defined]
    return blocks * (pools.whole.cost + pools.chunked.cost)


def test_urgent_requests_go_first(start: StartService) -> None:
    service = start(sequences=1)
    blocking = service.submit(request(herds.tokens(10), 600))
    ordered = [service.submit(request(herds.tokens(10, seed), 20, priority=priority))
               for seed, priority in enumerate((5, 0, 2))]
    for answer in (blocking, *ordered):
        tokens_of(answer)
    assert sorted(range(3), key=lambda index: ordered[index].usage.queue_seconds) == [1, 2, 0]


def test_a_full_queue_refuses_and_says_when_to_come_again(start: StartService) -> None:
    service = start(sequences=1, queued_requests=2)
    first = service.submit(request(herds.tokens(10), 3500))
    while not first.usage.completion_tokens:
        time.sleep(0.01)
    waiting = [service.submit(request(herds.tokens(10, seed), 1)) for seed in (1, 2)]
    with pytest.raises(OverloadedError, match="2 requests with 20 tokens are waiting") as refused:
        service.submit(request(herds.tokens(10)))
    assert refused.value.retry_after > 0
    first.cancel()
    for answer in waiting:
        tokens_of(answer)


def test_what_can_never_run_is_refused_at_the_door(engine: Engine, start: StartService) -> None:
    service = start(cache_bytes=_bytes_of(engine, 4))
    assert service.max_model_len < 4096
    with pytest.raises(HerdError, match=f"the prompt has 300 tokens and 4000 are asked for, at most "
                                        f"{service.max_model_len} fit"):
        service.submit(request(herds.tokens(300), 4000))
    with pytest.raises(HerdError, match="the prompt is empty"):
        service.submit(request([]))


@pytest.mark.parametrize("waiting", [False, True])
def test_a_cancelled_request_ends_and_frees_its_memory(waiting: bool, start: StartService) -> None:
    service = start(sequences=1)
    first = service.submit(request(herds.tokens(10), 3500))
    second = service.submit(request(herds.tokens(10, 1), 3500))
    time.sleep(0.1)
    (second if waiting else first).cancel()
    deltas = list(second if waiting else first)
    assert (deltas[-1].finish_reason, deltas[-1].error) == ("error", "the request was cancelled")
    (first if waiting else second).cancel()
    list(first if waiting else second)
    assert service.gauges()["kv_cache_usage"] == 0


def test_logprobs_of_prompt_and_answer_are_the_models(engine: Engine, start: StartService) -> None:
    prompt = herds.tokens(200)
    answer = start(step_tokens=70).submit(request(prompt, 3, prompt_logprobs=2, sampling=Sampling(logprobs=1)))
    deltas = list(answer)
    chosen = [entry for delta in deltas for entry in delta.logprobs]
    sequence = engine.new_sequence()
    ids = prompt + [entry.token_id for entry in chosen]
    logits = engine.prefill(sequence, ids, all_positions=True).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    found = [entry.logprob for entry in (*answer.prompt_logprobs[1:], *chosen) if entry]
    np.testing.assert_allclose(found, [logprobs[at, token] for at, token in enumerate(ids[1:])], atol=1e-5)
    assert answer.prompt_logprobs[0] is None
    assert len(answer.prompt_logprobs) == len(prompt)


def test_pictures_in_company_and_from_the_prefix_cache(engine: Engine, start: StartService) -> None:
    """Pictures that differ in pixels alone share nothing from there on; equal ones are not computed again."""
    service = start()
    pictures = [Image.fromarray(np.random.default_rng(seed).integers(0, 255, (28, 28, 3), dtype=np.uint8))
                for seed in range(2)]
    prompts = [engine.processor.prepare([{"role": "user", "content": [
        {"type": "text", "text": "x" * 150}, {"type": "image", "image": picture}, {"type": "text", "text": "y" * 90}]}])
        for picture in pictures]
    wanted = [alone(engine, prompt) for prompt in prompts]
    company = service.submit(request(herds.tokens(50), 60))
    answers = [service.submit(request(prompt)) for prompt in prompts]
    assert [tokens_of(answer)[0] for answer in answers] == wanted
    tokens_of(company)
    again = service.submit(request(prompts[0]))
    assert tokens_of(again)[0] == wanted[0]
    assert again.usage.cached_tokens == (len(prompts[0].token_ids) - 1) // 64 * 64
    other = prompts[1].token_ids.index(500) // 64 * 64
    third = service.submit(request(PreparedPrompt(prompts[0].token_ids, prompts[1].pixel_values[:1] * 0.5)))
    tokens_of(third)
    assert third.usage.cached_tokens == other


class Alternating:
    """Allows even tokens and odd ones in turn, and ends after four."""

    def __init__(self, said: int = 0) -> None:
        self.said = said

    def prepare(self) -> None: ...

    def apply(self, logits_V: np.ndarray) -> None:
        logits_V[1 - self.said % 2 :: 2] = -np.inf

    def accept(self, token_id: int) -> None:
        self.said += 1

    @property
    def is_complete(self) -> bool:
        return self.said == 4

    def fork(self) -> Alternating:
        return Alternating(self.said)


def test_a_constraint_holds_for_every_answer(start: StartService) -> None:
    answer = start().submit(request(herds.tokens(30), 20, choices=2, constraint=Alternating(),
                                    sampling=Sampling(temperature=1.0, seed=1)))
    for found in tokens_of(answer).values():
        assert [token % 2 for token in found] == [0, 1, 0, 1]


class Breaking(Alternating):
    """Fails after two tokens."""

    def accept(self, token_id: int) -> None:
        super().accept(token_id)
        if self.said == 2:
            raise HerdError("the grammar broke")

    def fork(self) -> Breaking:
        return Breaking(self.said)


def test_a_constraint_that_breaks_ends_its_request_and_no_others(engine: Engine, start: StartService) -> None:
    service, prompt = start(), herds.tokens(30)
    other = service.submit(request(prompt, 40))
    deltas = list(service.submit(request(herds.tokens(20), 20, choices=3, constraint=Breaking())))
    assert [delta.error for delta in deltas if delta.finish_reason] == ["the grammar broke"] * 3
    assert tokens_of(other)[0] == alone(engine, prompt, 40)


def test_texts_stop_where_they_should(engine: Engine, start: StartService) -> None:
    service, prompt = start(), herds.tokens(20)
    text = engine.processor.tokenizer.decode(alone(engine, prompt, 30))
    stop = text[4:6]
    for keeps in (False, True):
        deltas = list(service.submit(request(prompt, stop=StopRule(30, strings=(stop,), keeps_string=keeps))))
        assert "".join(delta.text for delta in deltas) == text[: text.index(stop) + 2 * keeps]
        assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", stop)
    first = alone(engine, prompt, 1)[0]
    late = list(service.submit(request(prompt, stop=StopRule(30, frozenset([first]), min_tokens=5))))
    assert sum(len(delta.token_ids) for delta in late) >= 5


def test_readers_in_an_event_loop_get_everything(engine: Engine, start: StartService) -> None:
    service = start()
    prompts = [herds.tokens(30, seed) for seed in range(4)]

    async def read(answer: Answer, delay: float) -> list[int]:
        found: list[int] = []
        async for delta in answer:
            found.extend(delta.token_ids)
            await asyncio.sleep(delay)
        return found

    async def all_of_them() -> list[list[int]]:
        answers = [service.submit(request(prompt)) for prompt in prompts]
        return await asyncio.gather(*(read(answer, 0.01 * index) for index, answer in enumerate(answers)))

    assert asyncio.run(all_of_them()) == [alone(engine, prompt) for prompt in prompts]


def test_draining_finishes_what_runs_and_takes_nothing_new(start: StartService) -> None:
    service = start()
    answer = service.submit(request(herds.tokens(30), 40))
    service.drain(10)
    assert len(tokens_of(answer)[0]) == 40
    with pytest.raises(OverloadedError, match="going down"):
        service.submit(request(herds.tokens(3)))


def test_a_call_that_fails_ends_its_requests_and_no_others(
    start: StartService, monkeypatch: pytest.MonkeyPatch
) -> None:
    service: Service = start()
    monkeypatch.setattr(service.engine.runner, "rows", lambda steps: (_ for _ in ()).throw(HerdError("weights moved")))
    deltas = list(service.submit(request(herds.tokens(3))))
    assert deltas[-1].error == "a call of the model failed: weights moved"
    monkeypatch.undo()
    assert len(tokens_of(service.submit(request(herds.tokens(3))))[0]) == 12
