"""Servers of a service that says what it is told to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from herdgraph.runtimes.server.app import create_app
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
