"""The checkpoint and the bundle that tests of the command line share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from herdgraph.model.config.presets import TINY
from support import herds
from support.command_line import run


@pytest.fixture(scope="session")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("cli with spaces")
    checkpoint, bundle = directory / "checkpoint", directory / "bundle"
    herds.save(TINY, checkpoint)
    herds.write_processor(checkpoint)
    done = run("build", checkpoint, "-o", bundle, "--json")
    assert json.loads(done.stdout)["bundle"] == str(bundle)
    return checkpoint, bundle
