"""Memory: a loaded bundle takes its own size, ``memory="low"`` maps it, and then it may be larger than the memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.low_memory import GROUPS, drop_from_page_cache, limited, run
from benchmarks.models import MODELS, tensors
from herdgraph.errors import HerdError
from herdgraph.export.pipeline import build_bundle
from herdgraph.model.checkpoint import open_checkpoint, save_checkpoint
from herdgraph.model.config.presets import TINY
from herdgraph.runtimes import Engine
from support import herds

PROBE = """
import json, sys
from pathlib import Path
from herdgraph.runtimes import Engine
import onnxruntime
def field(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
before = field("VmRSS")
engine = Engine.load(sys.argv[1], threads=1, memory=sys.argv[2])
engine.decode(engine.new_sequence(), 5)
print(json.dumps({"peak": field("VmHWM") - before, "resident": field("VmRSS") - before}))
"""


@pytest.mark.parametrize("recipe", ["fp32", "int8", "int4"])
def test_mapped_weights_give_the_same(recipe: str, tmp_path: Path) -> None:
    herds.save(TINY, tmp_path / "checkpoint")
    with open_checkpoint(tmp_path / "checkpoint") as checkpoint:
        build_bundle(checkpoint, tmp_path / "bundle", recipe=recipe)
    fast, low = (Engine.load(tmp_path / "bundle", threads=1, memory=memory) for memory in ("fast", "low"))
    ids = herds.tokens(40)
    wanted, found = (engine.prefill(engine.new_sequence(), ids, all_positions=True) for engine in (fast, low))
    np.testing.assert_array_equal(found, wanted)


def test_an_unknown_kind_of_memory(tmp_path: Path) -> None:
    with pytest.raises(HerdError, match="memory is 'none', it must be one of fast, low"):
        Engine.load(tmp_path, memory="none")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of about 300 MB with 64 experts in each of 4 layers."""
    directory = tmp_path_factory.mktemp("large")
    text = replace(MODELS["scout-mini"].text, num_layers=4, moe_layers=(0, 1, 2, 3), num_experts=64, hidden_size=512,
                   expert_size=704, rope_layers=(True,) * 4, chunked_layers=(True,) * 4, vocab_size=2048)
    config = replace(MODELS["scout-mini"], text=text)
    save_checkpoint(directory / "checkpoint", config, tensors(config))
    with open_checkpoint(directory / "checkpoint") as checkpoint:
        build_bundle(checkpoint, directory / "bundle", recipe="int8")
    return directory / "bundle"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_takes_the_size_of_the_bundle(large: Path) -> None:
    def probe(memory: str) -> dict[str, int]:
        done = subprocess.run([sys.executable, "-c", PROBE, str(large), memory], check=True, stdout=subprocess.PIPE)
        return json.loads(done.stdout)

    whole = (large / "decoder.data").stat().st_size
    fast, low = probe("fast"), probe("low")
    # Constants come on top that a bundle of gigabytes does not notice: the runtime, and pages that wait to be dropped.
    assert fast["peak"] < 1.15 * whole + (192 << 20)
    assert fast["resident"] < 1.05 * whole + (96 << 20)
    assert low["peak"] < 0.5 * whole


@pytest.mark.skipif(not any(os.access(path, os.W_OK) for path in GROUPS), reason="needs control groups: root on Linux")
def test_a_bundle_larger_than_the_memory(large: Path) -> None:
    data = large / "decoder.data"
    limit = int(0.6 * data.stat().st_size)
    drop_from_page_cache(data)
    with limited(limit) as group:
        row = run(large, 40, group)
    assert row["pages"] < limit
    assert row["ms"] > 0
    assert row["faults"] <= 4, "weights are read ahead; otherwise each of the four layers waits several times"
