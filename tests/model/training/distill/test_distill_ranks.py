"""Distillation over two real processes (gloo): ranks see different tokens and weigh them alike."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from herdgraph.model.config import HerdConfig
from herdgraph.model.config.presets import TINY
from support import herds
from support.processes import worker_environment

WORKER = Path(__file__).parents[3] / "support" / "distil_ranks_worker.py"


def test_both_ranks_balance_by_the_gradients_of_all(tmp_path: Path) -> None:
    herds.save(HerdConfig(text=TINY.text), tmp_path / "checkpoint")
    herds.write_processor(tmp_path / "checkpoint")
    rows = [{"text": f"The herd of {number} grazes on the green hill. "} for number in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(WORKER),
         str(tmp_path)],
        capture_output=True, text=True, check=False, env=worker_environment(), timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert len(first) == 3
    for (weight, hard), (other_weight, other_hard) in zip(first, second, strict=True):
        assert weight == pytest.approx(other_weight, rel=1e-6), "a mean over tokens in float32 of one number"
        assert hard != other_hard
        assert 0 < weight < 1
