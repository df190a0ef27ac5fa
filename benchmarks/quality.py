"""What a precision recipe costs on a real model and real English: perplexity and KL per token against fp32.

    python -m benchmarks.quality [CHECKPOINT] [--recipe int8]

The text (a page of Alice in Wonderland) was used to fit nothing. The last line compares tokens decoded one by one
with the same tokens prefilled, both in the recipe: how much a result depends on what else is in the call.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from herdgraph.console import fail, size, stderr, table
from herdgraph.export.pipeline import build_bundle
from herdgraph.export.verify import fidelity
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.runtimes import Engine

from .upcycle import TEXT, perplexity

DECODED = 300


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path, default=Path(".cache/demo/checkpoint"))
    parser.add_argument("--recipe", default="int8")
    args = parser.parse_args()
    if not args.checkpoint.is_dir():
        fail(f"{args.checkpoint} does not exist: run `make demo` once, or name a checkpoint")
    with tempfile.TemporaryDirectory(dir=".cache" if Path(".cache").is_dir() else None) as name:
        engines = {}
        for recipe in ("fp32", args.recipe):
            stderr.print(f"[dim]building {recipe}[/dim]")
            with open_checkpoint(args.checkpoint) as checkpoint:
                build_bundle(checkpoint, Path(name) / recipe, recipe=recipe)
            engines[recipe] = Engine.load(Path(name) / recipe)
        exact, quantised = engines["fp32"], engines[args.recipe]
        ids = exact.processor.tokenizer.encode(TEXT.read_text(encoding="utf-8"))
        reference, found = (e.prefill(e.new_sequence(), ids, all_positions=True) for e in (exact, quantised))
        sequence = quantised.new_sequence()
        decoded = np.stack([quantised.decode(sequence, token) for token in ids[:DECODED]])
        report, change = fidelity(reference, found), perplexity(found, ids) / perplexity(reference, ids) - 1
        table(f"{args.recipe} against fp32, {len(ids)} tokens of {TEXT.name}", {
            "perplexity": f"{perplexity(found, ids):.4f} for {perplexity(reference, ids):.4f} ({change:+.2%})",
            "mean KL": f"{report.mean_kl:.2e} nats per token", "largest KL": f"{report.max_kl:.2e}",
            "top-1 agreement": f"{report.top1_agreement:.2%}",
            "bundle": f"{size(quantised.bundle.bytes)} for {size(exact.bundle.bytes)}",
            "decoded against prefilled": f"mean KL {fidelity(found[:DECODED], decoded).mean_kl:.2e}",
        })


if __name__ == "__main__":
    main()
