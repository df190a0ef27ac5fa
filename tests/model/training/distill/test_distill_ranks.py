"""Codistillation over two real processes (gloo), started by torchrun: models spread over ranks, each in its turn."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from herdgraph.model.config import HerdConfig
from herdgraph.model.config.presets import TINY
from support import herds
from support.processes import worker_environment

WORKER = Path(__file__).parents[3] / "support" / "codistil_ranks_worker.py"


def test_a_teacher_that_learns_teaches_on_every_rank(tmp_path: Path) -> None:
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
    assert first == second
    assert len(first) == 3
    assert first[-1] < first[0]
    for name in ("teacher", "student-1"):
        assert (tmp_path / "run" / name / "model" / "config.json").is_file()
