"""Services that run on a tiny model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from herdgraph.runtimes import Engine
from herdgraph.runtimes.scheduler import Service, ServiceOptions

StartService = Callable[..., Service]


@pytest.fixture(scope="session")
def engine(chunked_bundle: Path) -> Engine:
    """For answers that somebody gets alone."""
    return Engine.load(chunked_bundle, threads=1)


@pytest.fixture
def start(chunked_bundle: Path) -> Iterator[StartService]:
    """Starts services on engines of their own, which end with the test."""
    services: list[Service] = []

    def started(*, cache_bytes: int = 64 << 20, **options: Any) -> Service:
        service = Service(Engine.load(chunked_bundle, threads=1, cache_bytes=cache_bytes), ServiceOptions(**options))
        services.append(service)
        return service

    yield started
    for service in services:
        service.close()
