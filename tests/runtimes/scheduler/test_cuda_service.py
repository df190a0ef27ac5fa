"""The service on the runner of the target ``cuda``: answers are those of the CPU's engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from herdgraph.model.config.presets import TINY
from herdgraph.runtimes import Engine
from herdgraph.runtimes.generation import Sampling
from herdgraph.runtimes.scheduler import Service, ServiceOptions
from support import herds
from support.cuda_twins import twin_of_checkpoint

from .test_service import alone, request, tokens_of


@pytest.fixture(scope="module")
def twin(chunked_bundle: Path, engine: Engine) -> Engine:
    """The tiny model with the runner of the target ``cuda``; its blocks are as long as its attention chunks."""
    config = replace(TINY, text=replace(TINY.text, attention_chunk_size=128))
    runner = twin_of_checkpoint(chunked_bundle.parent / "checkpoint", config, 4 << 20)
    return Engine(engine.bundle, runner, engine.vision)


@pytest.fixture(scope="module")
def service(twin: Engine) -> Iterator[Service]:
    with Service(twin, ServiceOptions(sequences=4)) as service:
        yield service


def test_answers_in_company(engine: Engine, service: Service) -> None:
    """Greedy ones as ids, drawn ones from logits, in the same calls."""
    prompts = [herds.tokens(length, seed) for seed, length in enumerate((1, 5, 127, 128, 130, 300))]
    greedy = [service.submit(request(prompt)) for prompt in prompts]
    drawn = service.submit(request(prompts[2], sampling=Sampling(temperature=1.0, seed=3)))
    assert [tokens_of(answer)[0] for answer in greedy] == [alone(engine, prompt) for prompt in prompts]
    assert tokens_of(drawn)[0] == alone(engine, prompts[2], temperature=1.0, seed=3)


@pytest.mark.parametrize(("length", "cached"), [(128, 0), (129, 128), (257, 256), (300, 256)])
def test_blocks_of_128_tokens_are_found_again(length: int, cached: int, engine: Engine, service: Service) -> None:
    prompt = herds.tokens(length, 9)
    wanted = alone(engine, prompt)
    assert tokens_of(service.submit(request(prompt)))[0] == wanted
    again = service.submit(request(prompt))
    assert tokens_of(again)[0] == wanted
    assert again.usage.cached_tokens == cached


def test_several_answers_to_one_prompt(engine: Engine, service: Service) -> None:
    several = tokens_of(service.submit(request(herds.tokens(70), choices=3, sampling=Sampling(temperature=1, seed=7))))
    assert [several[index] for index in range(3)] == [
        alone(engine, herds.tokens(70), temperature=1, seed=7 + index) for index in range(3)]


def test_generate_takes_ids_where_nothing_else_is_asked_for(engine: Engine, twin: Engine) -> None:
    found, wanted = (each.generate(herds.tokens(30), max_new_tokens=9) for each in (twin, engine))
    assert found.token_ids == wanted.token_ids
    told, wanted = (each.generate(herds.tokens(30), max_new_tokens=9, logprobs=1) for each in (twin, engine))
    assert [entry.token_id for entry in told.logprobs] == [entry.token_id for entry in wanted.logprobs]
