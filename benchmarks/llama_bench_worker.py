"""Measures a build of llama.cpp or ik_llama.cpp by its own programs; a worker as ``contest.py`` describes.

``variant`` is the build's directory; ``llama-bench`` and ``llama-batched-bench`` are taken from its ``bin``. Both are
asked for what makes them fastest on a CPU: flash attention, and in ik_llama.cpp weights repacked while they load
(``-rtr``), fused mixtures (``-fmoe``) and huge pages (``-thp``). The programs choose tokens themselves and show no
logits.
"""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

from .contest import Task, Times, serve

REPETITIONS = 3


def measure(task: Task) -> Times:
    """Run the programs one after the other."""
    programs = Path(task.variant) / "bin"
    fork = "-rtr" in _run([str(programs / "llama-bench"), "--help"]).stdout
    fast = ["-rtr", "1", "-fmoe", "1", "-thp", "1"] if fork else []
    prompt, new, batch = len(task.prompt), len(task.steps) - 1, len(task.steps[0])
    common = [str(programs / "llama-bench"), "-m", task.model, "-t", str(task.threads), "-r", str(REPETITIONS),
              "-o", "json", "-fa", "1", *fast]
    started = time.perf_counter()
    prefill = _samples([*common, "-p", str(prompt), "-n", "0"])
    elapsed = time.perf_counter() - started
    at_depth = ["-gp", f"{prompt},{new}", "-n", "0"] if fork else ["-d", str(prompt), "-n", str(new)]
    decode = _samples([*common, "-p", "0", *at_depth])
    together = _batch(programs, task, fork=fork) if batch > 1 else []
    return Times(max(0.0, elapsed - sum(prefill)), prefill, decode, together, peak_mb=0.0)


def _samples(command: list[str]) -> list[float]:
    """Seconds of each repetition of the last test."""
    tests = json.loads(_run(command).stdout)
    return [nanoseconds / 1e9 for nanoseconds in tests[-1]["samples_ns"]]


def _batch(programs: Path, task: Task, *, fork: bool) -> list[float]:
    """Seconds of decoding with all sequences, from the table of ``llama-batched-bench``."""
    prompt, new, batch = len(task.prompt), len(task.steps) - 1, len(task.steps[0])
    context = batch * (prompt + new) + 256
    done = _run([str(programs / "llama-batched-bench"), "-m", task.model, "-t", str(task.threads), "-c", str(context),
                   "-b", "512", "-ub", "512", "-npp", str(prompt), "-ntg", str(new), "-npl", str(batch),
                   *(["-rtr"] if fork else []), "-fa", "on"])
    table = (done.stdout + done.stderr).splitlines()  # ik_llama.cpp writes it among its log
    row = next(line for line in reversed(table) if line.strip().startswith("|") and line.count("|") > 8)
    cells = [cell.strip() for cell in row.strip().strip("|").split("|")]
    return [float(cells[6])]


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise SystemExit(f"{Path(command[0]).name} failed: {lines[-1] if lines else 'it said nothing'}")
    return done


if __name__ == "__main__":
    serve(measure)
