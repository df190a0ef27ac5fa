"""The prefix cache of sharded engines over real processes: what one request computed on all ranks, others take over."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from herdgraph.export.pipeline import build_bundle
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.config.shard_plan import ShardPlan
from herdgraph.model.processing import PreparedPrompt
from herdgraph.runtimes import Engine, Sampling
from herdgraph.runtimes.generation import StopRule
from herdgraph.runtimes.scheduler import Answer, GenerationRequest, Service
from support import herds

NEW = 8


@pytest.fixture(scope="module")
def whole(chunked_bundle: Path) -> Engine:
    return Engine.load(chunked_bundle, threads=1)


@pytest.fixture(scope="module", params=["tp=2", "ep=2", "pp=2"])
def service(chunked_bundle: Path, request: pytest.FixtureRequest) -> Iterator[Service]:
    """Attention chunks have 128 tokens: two cache blocks."""
    bundle = chunked_bundle.parent / request.param
    with open_checkpoint(chunked_bundle.parent / "checkpoint") as checkpoint:
        build_bundle(checkpoint, bundle, shards=ShardPlan.parse(request.param))
    with Service(Engine.load(bundle, threads=1, cache_bytes=16 << 20)) as service:
        yield service


def _asked(service: Service, prompt: list[int], choices: int = 1) -> Answer:
    return service.submit(GenerationRequest(request_id="r", prompt=PreparedPrompt(prompt), sampling=Sampling(),
                                            stop=StopRule(NEW), choices=choices))


def _tokens(answer: Answer) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in range(2)]
    for delta in answer:
        assert delta.finish_reason != "error", delta.error
        found[delta.choice].extend(delta.token_ids)
    return [tokens for tokens in found if tokens]


def _alone(engine: Engine, prompt: list[int]) -> list[int]:
    return engine.generate(prompt, max_new_tokens=NEW, stop_ids=[], temperature=0).token_ids


@pytest.mark.parametrize(("length", "cached"), [(100, 64), (128, 128), (150, 128), (200, 192), (300, 256)])
def test_a_document_is_computed_once_for_all_questions(
    length: int, cached: int, whole: Engine, service: Service
) -> None:
    """Documents that end before, on and after the boundary of an attention chunk."""
    document = herds.tokens(length, seed=length)
    prompts = [document + herds.tokens(5 + index, seed=index) for index in range(3)]
    assert _tokens(first := _asked(service, prompts[0])) == [_alone(whole, prompts[0])]
    assert first.usage.cached_tokens == 0
    answers = [_asked(service, prompt) for prompt in prompts[1:]]
    assert [_tokens(answer) for answer in answers] == [[_alone(whole, prompt)] for prompt in prompts[1:]]
    assert [answer.usage.cached_tokens for answer in answers] == [cached] * 2


def test_a_block_that_two_answers_write_is_copied_on_every_rank(whole: Engine, service: Service) -> None:
    prompt = herds.tokens(90, seed=7)
    assert _tokens(_asked(service, prompt, choices=2)) == [_alone(whole, prompt)] * 2
    assert service.gauges()["kv_cache_usage"] == 0
