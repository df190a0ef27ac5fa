"""A prediction for a machine that is not here, from the shares of its rates that this one reaches.

    python -m benchmarks.predict [--bandwidth 614] [--share 0.8] [--int8 TOPS]

The default is an EPYC 9175F (16 Zen 5 cores, twelve channels of DDR5-6400, 614 GB/s by its data sheet), on which
others published llama.cpp's rates: Scout Q6_K 16 to 17.5 tokens/s decoded and 40 prefilled, Maverick Q4_K_M 21 to 24
and Q8_0 15 to 16 decoded. Nothing here was run on it: these are predictions of the planner.
"""

from __future__ import annotations

import argparse

from herdgraph.export.planner.devices import Device, Efficiency, Fleet
from herdgraph.export.planner.memory import Workload
from herdgraph.export.planner.roofline import decode_rate, prefill_rate
from herdgraph.export.planner.storage import Storage
from herdgraph.model.config.presets import PRESETS
from herdgraph.model.config.shard_plan import ShardPlan

REACHED = Efficiency(weights=0.95, caches=0.5, compute=0.7, link=1.0, layer_seconds=60e-6)
"""Shares that our own operators reach here (docs/performance.md): products in decoding, attention over 8-bit caches,
products in prompts; and what the rest of a layer takes."""
PROMPT, CONTEXT = 512, 4096


def main() -> None:
    """Predict decoding and prompts of Scout and Maverick."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bandwidth", type=float, default=614, help="of the memory by its data sheet, GB/s")
    parser.add_argument("--share", type=float, default=0.8, help="of it that a program that only reads reaches")
    parser.add_argument("--int8", type=float, default=16 * 64 * 4 * 2 * 4.2e-3,
                        help="8-bit operations, 10^12 per second")
    args = parser.parse_args()
    device = Device("that machine", 768e9, bandwidth=args.bandwidth * args.share * 1e9,
                    flops={"fp32": args.int8 / 4 * 1e12, "int8": args.int8 * 1e12}, per_machine=1, efficiency=REACHED)
    fleet, whole = Fleet(device, 1, 1), ShardPlan()
    for model in ("scout", "maverick"):
        for recipe in ("int8", "int4"):
            storage = Storage.on(recipe, "int8", cpu=True)
            decode = decode_rate(PRESETS[model], whole, storage, fleet, Workload(CONTEXT, 1))
            prefill = prefill_rate(PRESETS[model], whole, storage, fleet, PROMPT)
            print(f"{model} {recipe}: predicted {decode.tokens_per_second:.0f} tokens/s decoded after {CONTEXT} "
                  f"({decode.limit}), {prefill.tokens_per_second:.0f} prefilled ({prefill.limit})")


if __name__ == "__main__":
    main()
