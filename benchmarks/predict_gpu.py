"""What a token of Scout and Maverick costs on GPUs, as the planner counts and predicts it. Nothing was run on them.

    python -m benchmarks.predict_gpu [--context 8192] [--batch 32]

For every GPU the fewest of them that the model fits, in powers of two, and the plan that decodes one sequence fastest.
Bytes are those that the busiest rank reads for a token, its keys and values among them; launches those of a rank, which
the hollow device counted (docs/hollow-device.md); seconds are the roofline's, with efficiencies that are assumed. The
second table has what others measured with vLLM, beside what the planner would have said.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from herdgraph.errors import HerdError
from herdgraph.export.planner import (
    Candidate,
    Fleet,
    ServingSpec,
    Storage,
    Workload,
    candidates,
    decode_rate,
    parse_fleet,
)
from herdgraph.export.planner.search import best_of
from herdgraph.export.planner.traffic import Call, work_of
from herdgraph.model.config import TextConfig
from herdgraph.model.config.presets import PRESETS
from herdgraph.model.config.shard_plan import ShardPlan

GPUS = ("H100", "H200", "L40S", "RTX5090")
MOST = 32
"""GPUs of a kind."""
ATTENTION, DENSE, TEMPERATURE = 9, 5, 1
"""Launches of a layer's norms and attention, of a dense feed-forward, and of global attention beside."""
BESIDE, SPLIT_VOCABULARY = 16, 5
"""Launches of no layer, and of a rank that has a part of the vocabulary beside."""
MIXTURE = {"bf16": 20, "int8": 17, "int4": 17}
"""Of a mixture with its shared expert, one token alone."""
PUBLISHED = (
    ("Maverick", "maverick", "fp8", "8xMI300X", ShardPlan(8), 4096, "7.7 to 8.8 ms",
     "https://github.com/vllm-project/vllm/pull/46553"),
    ("Scout, NVFP4 (int4 here)", "scout", "int4", "RTX-PRO-6000", ShardPlan(), 8192, "17 to 33 ms",
     "https://loftllc.dev/en/docs/tech/llm-research/llama-4-scout-17b-16e-cpu-vs-gpu-benchmark/"),
)
"""What, preset, recipe, GPUs, plan, context, milliseconds for a token of one sequence, and where it was published."""


def launches(text: TextConfig, plan: ShardPlan, recipe: str) -> int:
    """Kernels and products that a token waits for, exchanges left out; of a pipeline in all of its stages, whose own
    ends are not counted.
    """
    chunked = sum(text.chunk_of(layer) > 0 for layer in range(text.num_layers))
    mixtures = len(text.moe_layers)
    return (text.num_layers * ATTENTION + (text.num_layers - chunked) * TEMPERATURE + mixtures * MIXTURE[recipe]
            + (text.num_layers - mixtures) * DENSE + BESIDE + SPLIT_VOCABULARY * (plan.width > 1))


def named(plan: ShardPlan) -> str:
    """What is split, such as tp=2."""
    return ",".join(part for part in str(plan).split(",") if not part.endswith("=1")) or "one"


def smallest(spec: ServingSpec, gpu: str) -> tuple[Fleet, Candidate] | None:
    """The fewest GPUs that fit, and their best plan."""
    for count in (1 << power for power in range(MOST.bit_length())):
        fleet = parse_fleet(f"{count}x{gpu}")
        try:
            return fleet, best_of(candidates(spec, fleet), spec, fleet)
        except HerdError:
            continue
    return None


def rows(context: int, batch: int) -> Iterator[tuple[str, ...]]:
    """Of the first table."""
    for model in ("scout", "maverick"):
        config = PRESETS[model]
        for recipe in ("int4", "bf16"):
            storage = Storage.on(recipe, None, cpu=False)
            for gpu in GPUS:
                found = smallest(ServingSpec(config, storage, Workload(context, 1)), gpu)
                if found is None:
                    yield model, recipe, f"more than {MOST} {gpu}", *[""] * 6
                    continue
                fleet, best = found
                call = Call(1, 1, context - 1, 1)
                works = [work_of(config, best.plan, storage, stage, call) for stage in range(best.plan.pipeline)]
                read = sum(work.weight_bytes + work.cache_bytes for work in works)
                together = decode_rate(config, best.plan, storage, fleet, Workload(context, batch))
                yield (model, recipe, f"{fleet.count} {gpu}", named(best.plan), f"{best.used / 1e9:.1f}",
                       f"{read / 1e9:.2f}", f"{launches(config.text, best.plan, recipe)} + {best.collectives}",
                       f"{1e3 * best.decode.seconds:.1f} ms, {best.decode.limit}",
                       f"{together.tokens_per_second:.0f}")


def published() -> Iterator[tuple[str, ...]]:
    """Of the second table."""
    for what, preset, recipe, gpus, plan, context, measured, source in PUBLISHED:
        storage = Storage.on(recipe, "fp8" if recipe == "fp8" else None, cpu=False)
        rate = decode_rate(PRESETS[preset], plan, storage, parse_fleet(gpus), Workload(context, 1))
        link = f"[{source.split('/')[2]}]({source})"
        yield what, f"{gpus}, {named(plan)}", measured, f"{1e3 * rate.seconds:.1f} ms", link


def table(header: tuple[str, ...], lines: Iterator[tuple[str, ...]]) -> None:
    """Markdown."""
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for line in lines:
        print(f"| {' | '.join(line)} |")
    print()


def main() -> None:
    """Parse the command line and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args()
    table(("model", "recipe", "GPUs", "plan", "GB on the fullest", "GB read", "launches + exchanges", "predicted",
           f"{args.batch} together, tokens/s"), rows(args.context, args.batch))
    table(("what", "on", "measured with vLLM", "predicted", "source"), published())


if __name__ == "__main__":
    main()
