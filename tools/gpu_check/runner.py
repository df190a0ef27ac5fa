"""Runs the steps one after another, each in a process of its own, until the time is up."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .plan import Step

TOOLS = Path(__file__).parents[1]
_LEAST = 5.0
"""Seconds without which a step is not begun."""


def run_steps(
    steps: Iterable[Step], *, device: str, artifacts: Path, output: Path, seconds: float,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run the steps; the results are written to ``results.json`` after each, and returned.

    Args:
        steps: in order.
        device: see ``check.Device``.
        artifacts: files that were made before.
        output: folder for the results and every step's log.
        seconds: of all together.
        say: is told a line for every step.
    """
    output.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    results: dict[str, Any] = {"device": device, "python": platform.python_version(), "machine": platform.machine(),
                               "began": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()), "steps": []}
    for step in steps:
        left = seconds - (time.monotonic() - began)
        result = _run(step, device, artifacts, output, left) if left >= _LEAST else _skipped(step)
        results["steps"].append(result)
        results["seconds"] = round(time.monotonic() - began, 1)
        (output / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
        say(line(result))
    return results


def _run(step: Step, device: str, artifacts: Path, output: Path, left: float) -> dict[str, Any]:
    """One step, with what it printed and how it ended."""
    seconds = min(step.seconds, left)
    command = [sys.executable, "-m", f"{__package__}.step", step.name, "--device", device, "--artifacts",
               str(artifacts), "--seconds", str(seconds)]
    search = os.pathsep.join(filter(None, (str(TOOLS), os.environ.get("PYTHONPATH"))))
    began, ended = time.monotonic(), "ended"
    log = output / f"{step.name}.log"
    with log.open("wb") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, stdin=subprocess.DEVNULL,
                                   env=os.environ | {"PYTHONPATH": search}, start_new_session=True)
        try:
            printed, _ = process.communicate(timeout=seconds)
            ended = "ended" if process.returncode == 0 else f"crashed with status {process.returncode}"
        except subprocess.TimeoutExpired:
            _end(process)
            printed, _ = process.communicate()
            ended = f"stopped after {seconds:.0f} s"
    return {"name": step.name, "ended": ended, "seconds": round(time.monotonic() - began, 1),
            "checks": list(_checks(printed))}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a step with all that it started."""
    try:
        os.killpg(process.pid, 9)
    except ProcessLookupError:
        process.kill()


def _checks(printed: bytes) -> Iterable[dict[str, Any]]:
    """The checks of a step; the last line may have been cut off."""
    for text in printed.decode(errors="replace").splitlines():
        try:
            yield json.loads(text)
        except ValueError:
            continue


def _skipped(step: Step) -> dict[str, Any]:
    return {"name": step.name, "ended": "skipped: the time was up", "seconds": 0.0, "checks": []}


def line(result: dict[str, Any]) -> str:
    """A step in one line: how many checks passed, what failed, what was measured."""
    checks = result["checks"]
    counts = {status: sum(check["status"] == status for check in checks)
              for status in ("passed", "failed", "skipped", "measured")}
    text = ", ".join(f"{count} {status}" for status, count in counts.items() if count) or "nothing found"
    failed = [f"{check['name']} {_number(check)}{check['note']}".strip() for check in checks
              if check["status"] == "failed"]
    measured = [f"{check['name']} {check['value']:.4g}" for check in checks if check["status"] == "measured"]
    ended = "" if result["ended"] == "ended" else f" [{result['ended']}]"
    parts = [f"{result['name']:<14} {result['seconds']:6.1f} s{ended}  {text}", *failed[:4], *measured[:6]]
    return "; ".join(parts)


def _number(check: dict[str, Any]) -> str:
    return "" if check["value"] is None else f"{check['value']:.2e} > {check['limit']:.0e} "


def worst(results: dict[str, Any]) -> str:
    """``passed``, ``failed``, or ``incomplete`` where a step was stopped, crashed or skipped."""
    steps = results["steps"]
    if any(check["status"] == "failed" for step in steps for check in step["checks"]):
        return "failed"
    return "passed" if all(step["ended"] == "ended" for step in steps) else "incomplete"
