"""Capture full-size graphs from their configurations alone: seconds, peak memory, node counts.

    python -m benchmarks.capture [scout maverick ...] [--json]

Each capture runs in a fresh process, whose peak resident memory includes Python, torch and onnx themselves. The last
column of the printed table captures the same configuration with 2 experts: the canonical graph does not grow with
them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace

from herdgraph.console import stderr, table

from .memory import peak_megabytes


def measure(name: str, experts: int | None) -> dict[str, float | int | str]:
    """Capture one preset in this process."""
    from herdgraph.export.graph.capture import capture_decoder, capture_vision
    from herdgraph.model.config.presets import preset

    baseline = peak_megabytes() / 1e3
    config = preset(name)
    if experts:
        config = replace(config, text=replace(config.text, num_experts=experts))
    started = time.perf_counter()
    decoder = capture_decoder(config)
    decoder_seconds = time.perf_counter() - started
    vision = capture_vision(config) if config.vision else None
    return {
        "preset": name,
        "experts": config.text.num_experts,
        "decoder_seconds": round(decoder_seconds, 1),
        "total_seconds": round(time.perf_counter() - started, 1),
        "decoder_nodes": len(decoder.graph),
        "vision_nodes": len(vision.graph) if vision else 0,
        "baseline_gb": round(baseline, 2),
        "peak_gb": round(peak_megabytes() / 1e3, 2),
    }


def in_new_process(name: str, experts: int | None) -> dict[str, float | int | str]:
    """Capture one preset in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.capture", name, "--one"]
    if experts:
        command += ["--experts", str(experts)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return dict(json.loads(output.splitlines()[-1]))


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", default=["scout", "maverick"])
    parser.add_argument("--experts", type=int, help="override the number of experts")
    parser.add_argument("--one", action="store_true", help="measure in this process and print JSON")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.presets[0], args.experts)))
        return
    results = []
    for name in args.presets:
        for experts in (args.experts, 2):
            stderr.print(f"[dim]capturing {name}{f' with {experts} experts' if experts else ''}[/dim]")
            results.append(in_new_process(name, experts))
    if args.json:
        print(json.dumps(results, indent=2))
        return
    for result in results:
        table(f"{result['preset']}, {result['experts']} experts", result)


if __name__ == "__main__":
    main()
