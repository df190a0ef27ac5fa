"""The runner of GPU checks: a step that crashes or hangs ends alone, what it found before counts, and time is kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from gpu_check import runner
from gpu_check.plan import SECONDS, STEPS, Step

TOOLS = Path(__file__).parents[2] / "tools"

STEP_FILES = {
    "fine": "report.error('small', 1e-3, 1e-2, real=place.real); report.measure('speed [GB/s]', 1234.5)",
    "wrong": "report.error('large', 0.5, 1e-2); report.error('none', float('nan'), 1e-2)",
    "raises": ("\n    with report.attempt('first'):\n        raise RuntimeError('no\\nkernel')\n"
               "    report.holds('second', True)"),
    "crashes": "report.holds('before', True); import os; os.abort()",
    "hangs": "report.holds('before', True); import time; time.sleep(60)",
    "chats": "print('a library says hello'); report.holds('quiet', True)",
}


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package with steps that do what their name says."""
    package = tmp_path / "tools" / "gpu_check"
    shutil.copytree(TOOLS / "gpu_check", package, ignore=shutil.ignore_patterns("__pycache__"))
    for name, body in STEP_FILES.items():
        (package / f"{name}.py").write_text(f"def run(place, report):\n    {body}\n")
    monkeypatch.setattr(runner, "TOOLS", tmp_path / "tools")
    return tmp_path


def _run(tools: Path, *names: str, seconds: float = 30, each: int = 10) -> tuple[dict[str, Any], list[str]]:
    said: list[str] = []
    results = runner.run_steps([Step(name, each, "") for name in names], device="cpu", artifacts=tools,
                               output=tools / "output", seconds=seconds, say=said.append)
    assert json.loads((tools / "output" / "results.json").read_text()) == results
    return results, said


def test_what_steps_find(tools: Path) -> None:
    results, said = _run(tools, "fine", "wrong", "raises", "chats")
    statuses = {step["name"]: [check["status"] for check in step["checks"]] for step in results["steps"]}
    assert statuses == {"fine": ["passed", "measured"], "wrong": ["failed", "failed"], "raises": ["failed", "passed"],
                        "chats": ["passed"]}
    assert "1 passed, 1 measured; speed [GB/s] 1234" in said[0]
    assert "2 failed; large 5.00e-01 > 1e-02; none" in said[1]
    assert "first RuntimeError: no kernel" in said[2]
    assert "hello" in (tools / "output" / "chats.log").read_text()
    assert runner.worst(results) == "failed"


def test_a_crash_and_a_hang_end_alone(tools: Path) -> None:
    results, said = _run(tools, "crashes", "hangs", "fine", each=3)
    crashed, hung, fine = results["steps"]
    assert (crashed["ended"], hung["ended"]) == ("crashed with status -6", "stopped after 3 s")
    assert [check["name"] for check in crashed["checks"] + hung["checks"]] == ["before", "before"]
    assert fine["ended"] == "ended"
    assert "[crashed with status -6]  1 passed" in said[0]
    assert runner.worst(results) == "incomplete"


def test_steps_past_the_deadline_are_skipped(tools: Path) -> None:
    results, said = _run(tools, "fine", "fine", seconds=1)
    assert [step["ended"] for step in results["steps"]] == ["skipped: the time was up"] * 2
    assert runner.worst(results) == "incomplete"
    assert "[skipped: the time was up]" in said[0]


def test_numbers_of_a_hollow_device_do_not_count(tools: Path) -> None:
    (tools / "tools" / "gpu_check" / "hollow.py").write_text("def preload_hollow():\n    pass\n")
    results = runner.run_steps([Step("fine", 10, "")], device="hollow", artifacts=tools, output=tools / "output",
                               seconds=30, say=lambda text: None)
    check = results["steps"][0]["checks"][0]
    assert (check["status"], check["value"]) == ("passed", None)


def test_the_list_fits_its_time() -> None:
    assert sum(step.seconds for step in STEPS) <= SECONDS
    assert all((TOOLS / "gpu_check" / f"{step.name}.py").exists() for step in STEPS)
