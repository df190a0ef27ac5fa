"""Servers: of a service that says what it is told to, and of a real one on a tiny model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from herdgraph.runtimes import Engine
from herdgraph.runtimes.scheduler import PromptLookup, Service, ServiceOptions
from herdgraph.runtimes.server.app import create_app
from herdgraph.runtimes.server.listen import HttpServer, listening
from herdgraph.runtimes.server.options import ServerOptions
from support.fake_service import FakeEngine, FakeService
from support.fake_toolkit import FakeToolkit


@pytest.fixture(scope="session")
def fake_engine(tmp_path_factory: pytest.TempPathFactory) -> FakeEngine:
    return FakeEngine.in_directory(tmp_path_factory.mktemp("processor"))


@pytest.fixture
def service(fake_engine: FakeEngine) -> FakeService:
    return FakeService(fake_engine)


@pytest.fixture
def client_of(service: FakeService) -> Callable[..., TestClient]:
    """Makes clients of servers with other options; they send no exceptions on."""

    def make(**options: Any) -> TestClient:
        app = create_app(service, ServerOptions(**{"names": ("calf", "gpt-4o"), **options}), FakeToolkit())
        return TestClient(app, raise_server_exceptions=False)

    return make


@pytest.fixture
def client(client_of: Callable[..., TestClient]) -> TestClient:
    return client_of()


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text("# staff\nsk-one alice\nsk-two\n")
    return path


@pytest.fixture(scope="session")
def real_service(chunked_bundle: Path) -> Iterator[Service]:
    engine = Engine.load(chunked_bundle, threads=1)
    with Service(engine, ServiceOptions(step_tokens=128), drafter=PromptLookup()) as service:
        yield service


@pytest.fixture(scope="session")
def real_url(real_service: Service) -> Iterator[str]:
    with HttpServer(create_app(real_service, ServerOptions(names=("calf",))), listening("127.0.0.1", 0)) as server:
        yield server.url
