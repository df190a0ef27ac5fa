"""A tiny model with pictures, for schedulers and servers: its attention chunks are two cache blocks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from herdgraph.export.pipeline import build_bundle
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.config.presets import TINY
from support import herds


@pytest.fixture(scope="session")
def chunked_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("scheduler")
    herds.save(replace(TINY, text=replace(TINY.text, attention_chunk_size=128)), directory / "checkpoint")
    herds.write_processor(directory / "checkpoint")
    with open_checkpoint(directory / "checkpoint") as checkpoint:
        build_bundle(checkpoint, directory / "bundle")
    return directory / "bundle"
