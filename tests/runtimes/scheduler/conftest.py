"""A tiny model with pictures whose attention chunks are two cache blocks, and services that run on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from herdgraph.export.pipeline import build_bundle
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.config.presets import TINY
from herdgraph.runtimes import Engine
from herdgraph.runtimes.scheduler import Service, ServiceOptions
from support import herds

StartService = Callable[..., Service]


@pytest.fixture(scope="session")
def chunked_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("scheduler")
    herds.save(replace(TINY, text=replace(TINY.text, attention_chunk_size=128)), directory / "checkpoint")
    herds.write_processor(directory / "checkpoint")
    with open_checkpoint(directory / "checkpoint") as checkpoint:
        build_bundle(checkpoint, directory / "bundle")
    return directory / "bundle"


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
