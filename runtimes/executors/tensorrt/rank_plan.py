"""One rank's plan of a decoder that is split over GPUs. Not run on hardware.

Sums and joined rows are inside of the plan, which meets the others of its stage through a communicator of NCCL. What a
stage hands to the next one goes from GPU to GPU on the plan's own stream:

    receive hidden.{first}  ->  plan  ->  new keys and values to the caches  ->  send hidden.{end}

A call is over when its stream is done. Logits of the last stage come to the host there, and from its first rank to
rank 0's host.

The order in which ranks come together is NCCL's and TensorRT's: the GPU, the communicators, the plan's context, its
communicator (which waits for the whole stage), a barrier, and only then the first call. If TensorRT's binding keeps
Python's lock while it waits there, which was not seen, a rank that dies in that moment leaves the others waiting.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ...bundle.manifest import Bundle
from ...distributed.collectives import Collectives
from ...distributed.nccl import Nccl
from ...distributed.placement import gpu_of
from ...distributed.stage import Shard, Stage
from ...kv_cache.memory import CacheMemory
from ..options import ExecutorOptions
from .cuda import Cuda
from .device import DeviceExecutor
from .executor import Array, Call, Limits
from .load import load_plan
from .runner import PlanRunner


class RankPlan(Stage):
    """A rank's plan with its exchanges, as an ``Executor``.

    Args:
        executor: holds the plan.
        nccl: this rank's exchanges.
        bundle: a sharded one.
    """

    def __init__(self, executor: DeviceExecutor, nccl: Nccl, bundle: Bundle) -> None:
        shards = bundle.manifest.shards
        assert shards is not None, "a whole bundle has no ranks"
        super().__init__(nccl, shards.plan)
        self.executor, self.nccl, self._text = executor, nccl, bundle.manifest.config.text

    @property
    def memory(self) -> CacheMemory:
        """See ``Executor``."""
        return self.executor.memory

    @property
    def profiles(self) -> list[Limits]:
        """See ``Executor``: of what this stage's plan has."""
        return self.executor.profiles

    @property
    def takes_features(self) -> bool:
        """See ``Executor``."""
        return self.executor.takes_features

    def run(self, call: Call) -> Array:
        """See ``Executor``; before the last stage the logits are room for those that come back."""
        batch, tokens = call.inputs["input_ids"].shape
        given = {}
        with self.nccl.watch.call():
            if name := self.executor.receives:
                given[name] = self.executor.place(name, (batch, tokens, self._text.hidden_size))
                self.receive_hidden(given[name])
            found = self.executor.forward(call, given)
            if name := self.executor.hands_on:
                self.send_hidden(found[name])
        if "logits" not in found:
            return np.empty((batch, len(call.inputs["logit_rows"]), self._text.vocab_size), np.float32)
        logits = self.executor.download(found["logits"])
        if self.returns_logits:
            self.return_logits(logits)
        return logits

    def close(self) -> None:
        """Let go of the plan's context, before its communicator."""
        self.executor.close()


def load_rank_plan(bundle: Bundle, link: Collectives, _: ExecutorOptions) -> Shard:
    """A rank's runner on TensorRT. The options are for executors on the CPU.

    Raises:
        HerdError: a package, the driver, NCCL or the GPU is missing, or the plan is for another version or GPU.
    """
    shards, config = bundle.manifest.shards, bundle.manifest.config
    assert shards is not None, "a whole bundle has no ranks"
    plan, rank = shards.plan, link.rank
    context = _context(bundle.manifest.plans[f"rank{rank}/decoder"])
    text = plan.local_text(replace(config.text, max_position_embeddings=context), rank)
    chunks = tuple(text.chunk_of(layer) for layer in range(text.num_layers))
    cuda = Cuda(gpu_of(rank))
    nccl = Nccl(link, plan, cuda)
    try:
        executor = load_plan(bundle, f"rank{rank}/decoder", bundle.directory / shards.ranks[rank].partitions[0].graph,
                             cuda, chunks)
        if plan.width > 1:
            nccl.watch.patiently(lambda: executor.set_communicator(nccl.capsule()))
    except BaseException:
        nccl.watch.abort()
        raise
    stage = RankPlan(executor, nccl, bundle)
    return Shard(PlanRunner(stage, replace(config, text=text), batches=plan.pipeline), stage)


def _context(plan: dict[str, Any]) -> int:
    """Tokens that all ranks were built for; the plan of a stage of chunked layers alone would not know."""
    return max(profile["slots_global"][-1] for profile in plan["profiles"])
