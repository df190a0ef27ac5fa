"""The dashboard asks for what the server has: each metric, by the labels that it sums and selects by."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

import herdgraph

DASHBOARD = Path(herdgraph.__file__).parent / "deploy" / "grafana.json"
_METRIC = re.compile(r"(?:vllm:|http_)\w+")


def expressions() -> Iterator[str]:
    """All that the dashboard asks Prometheus."""
    dashboard: dict[str, Any] = json.loads(DASHBOARD.read_text())
    yield from (target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    yield from (variable["query"] for variable in dashboard["templating"]["list"] if variable["type"] == "query")


@pytest.mark.parametrize("expression", expressions())
def test_metrics_of_the_dashboard(client: TestClient, expression: str) -> None:
    assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 200
    families = text_string_to_metric_families(client.get("/metrics").text)
    labels = {sample.name: set(sample.labels) for family in families for sample in family.samples}
    names = _METRIC.findall(expression)
    assert names
    assert set(names) <= set(labels)
    asked = {label for listed in re.findall(r"by \(([\w, ]+)\)", expression) for label in listed.split(", ")}
    asked |= set(re.findall(r"(\w+)=~", expression))
    assert all(asked <= labels[name] for name in names)
