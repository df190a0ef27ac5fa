"""A scheduler that is driven by hand: whoever measures sees every step, and what memory holds between two of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from herdgraph.model.processing import PreparedPrompt
from herdgraph.runtimes import Engine, Sampling
from herdgraph.runtimes.generation import StopRule
from herdgraph.runtimes.kv_cache.paged import CachePools
from herdgraph.runtimes.kv_cache.prefix_cache import PrefixCache
from herdgraph.runtimes.scheduler import Answer, GenerationRequest, ServiceOptions
from herdgraph.runtimes.scheduler.active import ActiveRequest
from herdgraph.runtimes.scheduler.scheduler import Scheduler


@dataclass
class Desk:
    """Takes requests and computes them when it is told to.

    Attributes:
        engine: loaded.
        options: limits.
    """

    engine: Engine
    options: ServiceOptions = field(default_factory=ServiceOptions)

    def __post_init__(self) -> None:
        limits = self.options
        self.scheduler = Scheduler(self.engine, sequences=limits.sequences, step_tokens=limits.step_tokens,
                                   slowdown=limits.slowdown)

    @classmethod
    def of(cls, bundle: Path, threads: int) -> Desk:
        """A desk over a bundle."""
        return cls(Engine.load(bundle, threads=threads, verify=False))

    @property
    def pools(self) -> CachePools:
        """Where keys and values are."""
        pools = self.engine.runner.pools
        assert pools is not None, "a bundle for target cpu"
        return pools

    @property
    def prefixes(self) -> PrefixCache:
        """What is known of earlier prompts."""
        prefixes = self.scheduler.prefixes
        assert prefixes is not None, "attention chunks of whole blocks"
        return prefixes

    def ask(self, prompt: PreparedPrompt, tokens: int, **options: Any) -> Answer:
        """A greedy answer of so many tokens, which nothing ends before; its keys are hashed here."""
        config = self.engine.config
        answer = Answer(1, lambda _: None)
        self.scheduler.add(ActiveRequest(
            GenerationRequest(request_id="", prompt=prompt, sampling=Sampling(), stop=StopRule(tokens),
                              never=(config.image_token_id,) if config.vision else (), **options),
            answer, config, None))
        return answer

    def run(self) -> None:
        """Compute everything that was asked for."""
        while self.scheduler.has_work:
            self.scheduler.step()

    def run_until_all_decode(self) -> None:
        """Compute until every answer has begun to be read."""
        while not all(choice.is_decoding for choice in self.scheduler.running) or self.waiting:
            self.scheduler.step()

    @property
    def waiting(self) -> bool:
        """Whether requests have not begun."""
        return len(self.scheduler.running) < len(self.scheduler.requests)
