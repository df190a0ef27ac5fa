"""Files for deployment say what the command, the addresses and the metadata of the package are."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi import FastAPI

import herdgraph
from herdgraph.cli.serve import serve
from herdgraph.runtimes.server.app import create_app
from herdgraph.runtimes.server.options import ServerOptions

ROOT = Path(herdgraph.__file__).parent
DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()


def dockerfile(instruction: str) -> list[str]:
    """The words of an instruction in JSON's form."""
    words: list[str] = json.loads(re.findall(rf"{instruction} (\[.*\])", DOCKERFILE)[-1])
    return words


@pytest.fixture(scope="module")
def unit() -> configparser.SectionProxy:
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment]
    parser.read(DEPLOY / "herdgraph.service")
    return parser["Service"]


@pytest.fixture(scope="module")
def pod() -> dict[str, Any]:
    deployment, service = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    template: dict[str, Any] = deployment["spec"]["template"]
    labels = template["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"] == labels
    assert service["spec"]["ports"][0]["targetPort"] == "http"
    return template


def parsed(words: list[str]) -> dict[str, Any]:
    """What the command makes of its words, the program's name and the verb included; it fails on an unknown one."""
    program, verb, *arguments = words
    assert (Path(program).name, verb) == ("herdgraph", "serve")
    return serve.make_context("serve", arguments).params


def test_the_image() -> None:
    options = parsed(dockerfile("ENTRYPOINT"))
    assert (options["host"], options["port"]) == ("0.0.0.0", int(re.findall(r"EXPOSE (\d+)", DOCKERFILE)[0]))
    assert f":{options['port']}/health'" in dockerfile("CMD")[-1]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installed = re.findall(r"\[([\w,]+)\]\"", DOCKERFILE)
    assert installed == ["cpu,serve,video"] * 2
    assert set(installed[0].split(",")) <= set(project["optional-dependencies"])
    oldest = project["requires-python"].removeprefix(">=")
    assert set(re.findall(r"FROM python:([\d.]+)-slim", DOCKERFILE)) == {oldest}


def test_the_systemd_unit(unit: configparser.SectionProxy) -> None:
    options = parsed(shlex.split(unit["ExecStart"]))
    assert options["api_keys"] == Path("/etc/herdgraph/keys")
    assert float(unit["TimeoutStopSec"]) > options["drain_timeout"]
    comments = (DEPLOY / "herdgraph.service").read_text()
    assert f"--drain-timeout, {options['drain_timeout']:g} s" in comments


def test_the_kubernetes_manifest(pod: dict[str, Any]) -> None:
    container, mounts = pod["spec"]["containers"][0], pod["spec"]["containers"][0]["volumeMounts"]
    options = parsed([*dockerfile("ENTRYPOINT"), *container["args"]])
    assert container["ports"] == [{"name": "http", "containerPort": options["port"]}]
    assert pod["metadata"]["annotations"]["prometheus.io/port"] == str(options["port"])
    assert pod["spec"]["terminationGracePeriodSeconds"] > options["drain_timeout"]
    assert int(container["resources"]["requests"]["cpu"]) == options["threads"]
    roots = [Path(mount["mountPath"]) for mount in mounts]
    assert options["bundle"] in roots
    assert options["api_keys"].parent in roots
    assert {mount["name"] for mount in mounts} == {volume["name"] for volume in pod["spec"]["volumes"]}


def test_probed_addresses_exist(pod: dict[str, Any]) -> None:
    app: FastAPI = create_app(None, ServerOptions(names=("calf",)))
    container = pod["spec"]["containers"][0]
    probed = {name: container[name]["httpGet"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert {name: probe["path"] for name, probe in probed.items()} == {
        "startupProbe": "/ready", "readinessProbe": "/ready", "livenessProbe": "/health"}
    assert {probe["port"] for probe in probed.values()} == {"http"}
    paths = set(app.openapi()["paths"])
    assert {pod["metadata"]["annotations"]["prometheus.io/path"], "/ready", "/health"} <= paths
