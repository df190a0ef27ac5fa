"""What the routes of one server share: the service, the names of its model, keys, metrics, and whether it is open."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

from ...errors import HerdError
from ...model.config import HerdConfig
from ...model.processing import PromptProcessor
from ..scheduler import Answer, GenerationRequest, OverloadedError
from .errors import ApiError, of_herd_error
from .keys import Key, Keys
from .metrics import Metrics
from .options import ServerOptions
from .toolkit import Toolkit

Phase = Literal["loading", "ready", "draining"]

PREPARED_AT_ONCE = 4
"""Prompts that are rendered, encoded and tiled at the same time, each on a thread."""


class Model(Protocol):
    """What the server asks of an engine."""

    @property
    def config(self) -> HerdConfig:
        """The model."""

    @property
    def processor(self) -> PromptProcessor:
        """Text and images to tokens."""


class Backend(Protocol):
    """What the server asks of a service; ``runtimes.scheduler.Service`` says more."""

    max_model_len: int
    failure: str
    on_step: Callable[[int], None]

    @property
    def engine(self) -> Model:
        """Its engine."""

    def submit(self, request: GenerationRequest) -> Answer:
        """Queue a request."""

    def gauges(self) -> Mapping[str, float]:
        """What it counts."""

    def cache_config(self) -> Mapping[str, str]:
        """The memory of keys and values, under vLLM's names."""


class Running(Protocol):
    """What is told of a prompt that the service has; ``runs.Run`` says more."""

    key: Key | None

    def told(self) -> dict[str, Any]:
        """Its numbers."""


class Serving:
    """The state of one server.

    Args:
        options: of the operator.
        toolkit: tools and grammars.

    Attributes:
        running: prompts that the service has, waiting or not.
    """

    def __init__(self, options: ServerOptions, toolkit: Toolkit) -> None:
        self.options, self.toolkit = options, toolkit
        self.keys = Keys(options.api_keys) if options.api_keys else None
        self.metrics = Metrics(options.names[0], self._gauges, self._cache_config)
        self.phase: Phase = "loading"
        self.preparing = asyncio.Semaphore(PREPARED_AT_ONCE)
        self.running: set[Running] = set()
        self._service: Backend | None = None

    @property
    def model(self) -> str:
        """The model's name."""
        return self.options.names[0]

    def open(self, service: Backend) -> None:
        """Answer requests from now on."""
        self._service, self.phase = service, "ready"
        service.on_step = self.metrics.count_step
        self.toolkit.attach(service.engine.processor, service.engine.config, self.options.tool_format)

    def drain(self) -> None:
        """Take no more requests; those that run go on."""
        self.phase = "draining"

    def require_open(self) -> None:
        """Refuse a request while there is nobody to answer it.

        Raises:
            ApiError: the model is being loaded, or the server is ending.
        """
        if self.phase == "draining":
            raise ApiError(503, "the server is ending", retry_after=10, headers={"connection": "close"})
        if self._service is None:
            raise ApiError(503, "the model is being loaded", retry_after=5)

    @property
    def failed(self) -> str:
        """Why the engine runs no more, empty while it runs or is not there yet."""
        return self._service.failure if self._service and self.phase == "ready" else ""

    @property
    def service(self) -> Backend:
        """The service.

        Raises:
            ApiError: it is not there yet.
        """
        if self._service is None:
            raise ApiError(503, "the model is being loaded", retry_after=5)
        return self._service

    @property
    def processor(self) -> PromptProcessor:
        """Text and images to tokens."""
        return self.service.engine.processor

    @property
    def config(self) -> HerdConfig:
        """The model."""
        return self.service.engine.config

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer together."""
        most = self.service.max_model_len
        return most if self.options.context is None else min(most, self.options.context)

    @property
    def most_context(self) -> int:
        """The context, 0 while the model is being loaded."""
        return self.context if self._service else 0

    def submit(self, request: GenerationRequest) -> Answer:
        """Queue a request.

        Raises:
            ApiError: the queue is full, or the request can never run.
        """
        try:
            return self.service.submit(request)
        except OverloadedError as error:
            self.metrics.count_rejection("overloaded")
            raise ApiError(503, str(error), retry_after=error.retry_after) from error
        except HerdError as error:
            raise of_herd_error(error) from error

    def require_model(self, name: str | None) -> None:
        """Refuse a request for another model.

        Raises:
            ApiError: it has another name.
        """
        if name is not None and name not in self.options.names:
            known = ", ".join(self.options.names)
            raise ApiError(404, f"the model {name[:100]!r} does not exist here, only {known}", param="model",
                           code="model_not_found")

    def _gauges(self) -> Mapping[str, float]:
        return {} if self._service is None else self._service.gauges()

    def _cache_config(self) -> Mapping[str, str]:
        return {} if self._service is None else self._service.cache_config()
