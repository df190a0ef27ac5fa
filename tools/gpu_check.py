"""Check herdgraph on an NVIDIA GPU, in nine minutes, and write what was found to send to us.

    python tools/gpu_check.py [--output DIR] [--seconds 540] [--only STEP,STEP] [--dry-run hollow|cpu]

Every step is a process of its own with a time of its own: a crash ends the step, and steps past the deadline are
skipped, not failed. ``--dry-run`` checks the script and not the GPU: on ``cpu`` in float32, where numbers count; on
``hollow``, stub libraries on which onnxruntime-gpu runs without computing (docs/hardware.md), where they do not.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from gpu_check.artifacts import make_artifacts
from gpu_check.plan import SECONDS, STEPS
from gpu_check.runner import run_steps, worst

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Make what is not there yet, run the steps, and say how it went; exit status 1 when a check failed."""
    names = [step.name for step in STEPS]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", ROOT / ".cache" / "gpu-check")))
    parser.add_argument("--artifacts", type=Path, default=ROOT / ".cache" / "gpu-check-artifacts")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--only", default=",".join(names), help=f"some of {','.join(names)}")
    parser.add_argument("--dry-run", choices=("hollow", "cpu"))
    wanted = parser.parse_args()
    chosen = wanted.only.split(",")
    if unknown := set(chosen) - set(names):
        parser.error(f"no step is called {', '.join(sorted(unknown))}: choose among {', '.join(names)}")
    make_artifacts(wanted.artifacts)
    results = run_steps([step for step in STEPS if step.name in chosen], device=wanted.dry_run or "cuda",
                        artifacts=wanted.artifacts, output=wanted.output, seconds=wanted.seconds, say=_say)
    _say(f"{worst(results)} after {results['seconds']:.0f} s; results: {wanted.output / 'results.json'}")
    sys.exit(worst(results) == "failed")


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
