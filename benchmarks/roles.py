"""Where the time of a token goes, by the role of the operator, and how many experts a batch touches.

    python -m benchmarks.roles BUNDLE [--threads 1] [--context 512] [--batch 1] [--prompt]
                               [--json] [--plot FILE]

ONNX Runtime's own profiler writes one event per operator; writing them makes small operators look one to three
microseconds longer than they are. ``--prompt`` profiles a prompt of --context tokens instead of a token.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from rich.table import Table

import herdgraph.runtimes.executors.ort.load as load_module
from herdgraph.runtimes import Engine
from herdgraph.runtimes.executors.options import ExecutorOptions

from .figures import bars
from .screen import show_tables

TOKENS = 8
ROLES = (
    (r"lm_head", "head"), (r"GroupQueryAttention", "attention"),
    (r"self_attn\.(qk_norm|rotary)|RotaryEmb", "rotary, qk norm"),
    (r"self_attn", "attention projections"), (r"shared_expert", "shared expert"),
    (r"experts.*(quantised|rotated|MatMul|Sigmoid_|Mul_|Split_)", "routed experts"), (r"experts|router", "routing"),
    (r"layernorm|norm", "norms"), (r"gate_proj|up_proj|down_proj", "dense feed-forward"),
)


def role_of(event: dict[str, Any]) -> str:
    """The role of an operator by its name, which mirrors the module it came from."""
    text = f"{event['name']} {event['args']['op_name']}"
    if "experts/" in text and "/then_" not in text and "quantised" not in text:
        return "routing"
    return next((role for pattern, role in ROLES if re.search(pattern, text)), "other")


def profiled_session(directory: str) -> Any:
    """What stands in for ``create_session``: the same session, with the profiler on."""

    def create(path: Path, *, provider: str, options: ExecutorOptions) -> Any:
        profiled = onnxruntime.SessionOptions()
        profiled.log_severity_level = 3
        profiled.intra_op_num_threads = options.threads or 0
        profiled.enable_profiling = True
        profiled.profile_file_prefix = f"{directory}/profile"
        return onnxruntime.InferenceSession(str(path), profiled, providers=[provider])

    return create


def events_of(engine: Engine, *, context: int, batch: int, prompt: bool) -> tuple[list[dict[str, Any]], int]:
    """Operator events of the calls to be profiled, and the number of calls."""
    ids = np.random.default_rng(0).integers(3, 1000, context).tolist()
    sequences = [engine.new_sequence() for _ in range(batch)]
    for sequence in sequences:
        engine.prefill(sequence, ids)
    steps = np.random.default_rng(1).integers(3, 1000, (TOKENS, batch)).tolist()
    for row in [] if prompt else steps:
        engine.decode_batch(sequences, row)
    runs = 1 if prompt else TOKENS
    events = json.loads(Path(engine._decoder.graph.session.end_profiling()).read_text(encoding="utf-8"))
    begin = [event["ts"] for event in events if event["name"] == "model_run"][-runs]
    return [
        event for event in events
        if event["ts"] >= begin and event.get("cat") == "Node" and event["name"].endswith("kernel_time")
    ], runs


def experts_touched(events: list[dict[str, Any]], runs: int) -> float:
    """Experts that ran, per layer and call: their products live in branches of their own."""
    leaves = Counter(
        event["name"].rsplit("/rotated", 1)[0] for event in events
        if ".experts/" in event["name"] and "/rotated/MatMul" in event["name"]
    )
    layers = {name.split(".feed_forward")[0] for name in leaves}
    return sum(leaves.values()) / max(len(layers), 1) / runs


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        load_module.create_session = profiled_session(directory)
        engine = Engine.load(args.bundle, threads=args.threads, verify=False)
        events, runs = events_of(engine, context=args.context, batch=args.batch, prompt=args.prompt)
    spent: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for event in events:
        if event["args"]["op_name"] != "If":
            spent[role_of(event)] += event["dur"]
            count[role_of(event)] += 1
    touched = experts_touched(events, runs)
    if args.plot:
        bars(args.plot, f"Where a token's time goes: {args.bundle.name}, {args.context} tokens before", "ms",
             {role: us / runs / 1000 for role, us in spent.most_common()})
    if args.json:
        print(json.dumps({"ms": {role: us / runs / 1000 for role, us in spent.items()}, "experts_per_layer": touched}))
        return
    title = f"{args.bundle}, context {args.context}, batch {args.batch}"
    table = Table("role", "ms", "share", "operators", title=title)
    for role, us in spent.most_common():
        table.add_row(role, f"{us / runs / 1000:.2f}", f"{us / spent.total():.0%}", f"{count[role] / runs:.0f}")
    show_tables(table)
    print(f"experts touched per layer and call: {touched:.2f}")


if __name__ == "__main__":
    main()
