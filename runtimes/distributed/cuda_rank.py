"""A rank on a GPU: partitions on ONNX Runtime's CUDA provider, collectives through NCCL. Not run on hardware.

Partitions and exchanges are put on one stream, and nobody waits before the call's end: what crosses from one partition
to the next stays on the GPU. Of the logits only those that somebody reads come to the host, on rank 0, or on the first
rank of the last stage of a pipeline, which sends them there.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ..bundle.manifest import WEIGHTS, Bundle
from ..executors.blocks import PlacedStep
from ..executors.device_array import DeviceArray
from ..executors.options import ExecutorOptions
from ..executors.ort.cuda.graph import NOT_RECORDED, Run
from ..executors.ort.cuda.load import check_inputs
from ..executors.ort.cuda.memory import ELEMENTS, cache_budget, call_bytes, free_bytes, memory_limit
from ..executors.ort.cuda.runner import MOST_RECORDED, CudaRunner
from ..executors.ort.cuda.session import asynchronous, cuda_session, require_gpu, share_memory
from ..executors.ort.cuda.stream import CudaStream
from ..executors.ort.cuda.views import Place
from ..executors.ort.session import Values
from ..executors.runner import Logits
from .collectives import Collectives
from .nccl import Nccl
from .partition import CapturedCall, run_once
from .placement import gpu_of
from .rank_graph import RankGraph, graphs_of
from .stage import Shard, plan_of, stage_texts

_TYPES = {"float": "float32", "bfloat16": "bfloat16"}
"""Names that NCCL has for what is exchanged, by onnxruntime's."""
_HANDLE_BYTES = 33 << 20
"""That cuBLAS takes for itself, for every session: what its documentation says of Hopper, the most of all."""
_CROSSING = 3
"""Hidden states that a partition hands on, at most; recorded calls keep theirs."""


class CudaRankGraph(RankGraph):
    """See the module, and ``CudaGraph``.

    Args:
        bundle: a sharded one.
        nccl: this rank's exchanges.
        stream: theirs.
        place: the GPU.
    """

    def __init__(self, bundle: Bundle, nccl: Nccl, stream: CudaStream, place: Place) -> None:
        share_memory(place)
        sessions = [cuda_session(path, place, stream=stream.handle) for path in graphs_of(bundle, nccl.rank)]
        super().__init__(bundle, nccl, sessions, (place.kind, place.index))
        self.place, self._stream, self._nccl, self._options = place, stream, nccl, asynchronous()
        self._sends = any(exchange.op == "send" for exchange in self.partitions[-1].entry.after)
        self.outputs = frozenset(name for one in self.partitions for name in one.outputs) | {
            exchange.result for one in self.partitions for exchange in one.entry.after}
        items = (item for one in self.partitions for item in (*one.session.get_inputs(), *one.session.get_outputs()))
        self._elements = {item.name: _element(item.type) for item in items}

    def bind(self, inputs: Values, outputs: Values, recording: int) -> Run:
        """See ``CudaGraph``."""
        shape = (1, int(inputs["input_ids"].shape()[0]))
        if recording == NOT_RECORDED:
            return partial(self._call, partial(run_once, self.steps(inputs, outputs, shape, None)))
        call = CapturedCall(self.steps(inputs, outputs, shape, {}))
        return partial(self._call, _RecordedCall(call, self._stream, own=int(self._sends)))

    def _call(self, run: Run) -> None:
        """One call of the model, until all of it has happened."""
        self._stream.activate()
        with self._nccl.watch.call():
            run()

    def run(self, session: Any, io: Any, values: tuple[Values, ...]) -> None:
        """See ``RankGraph``: it is put on the stream, and nobody waits."""
        del values
        session.run_with_iobinding(io, self._options)

    def seen(self, value: Any) -> DeviceArray:
        """See ``RankGraph``."""
        return DeviceArray(value.data_ptr(), tuple(value.shape()), _TYPES[_element(value.data_type())])

    def empty(self, name: str, shape: tuple[int, ...]) -> Any:
        """See ``RankGraph``."""
        return self.place.empty(shape, ELEMENTS[self._elements[name]][0])


class _RecordedCall:
    """A call that comes again: step by step at first, then as one CUDA graph, exchanges included.

    The first time finds sizes, what is fast, and memory for what partitions hand on. Memory for what they need
    meanwhile is found by the second time, right after which the same is recorded: a recorded call may take none. What
    goes to the next stage is no part of the graph: rank 0 takes logits of older calls before, while the graph runs.

    Args:
        call: runs the steps.
        stream: on which they run.
        own: steps at the end that are no part of the graph.
    """

    def __init__(self, call: CapturedCall, stream: CudaStream, own: int) -> None:
        self._call, self._stream, self._own = call, stream, own
        self._launch: Run | None = None

    def __call__(self) -> None:
        """Run."""
        steps, count = self._call.recorded, len(self._call.recorded) - self._own
        if self._launch is not None:
            self._launch()
            run_once(steps[count:])
            return
        is_first = not steps
        self._call()
        if not is_first:
            self._launch = self._stream.record(partial(run_once, steps[:count]))


class CudaRank(CudaRunner):
    """Runs a rank's part; see ``CudaRunner``.

    Args:
        graph: the rank's.
        bundle: a sharded one.
        cache_bytes: that keys and values of all sequences may use on every rank.
    """

    def __init__(self, graph: CudaRankGraph, bundle: Bundle, cache_bytes: int) -> None:
        config, plan, rank = bundle.manifest.config, graph.plan, graph.link.rank
        stages = stage_texts(plan, config.text)
        super().__init__(graph, replace(config, text=stages[plan.stage_of(rank)]), cache_bytes, stages)
        self._stage = graph
        self.reads_logits = graph.returns_logits or (rank == 0 and plan.pipeline == 1)

    def compute(self, steps: Items[PlacedStep]) -> Logits:
        """See ``BlockRunner``; logits of the last stage go to rank 0, others that nobody reads are not filled."""
        if not self.reads_logits:
            self.answers(steps)
            return np.empty((sum(len(step.rows) for step in steps), self.config.text.vocab_size), np.float32)
        logits = super().compute(steps)
        if self._stage.returns_logits:
            self._stage.return_logits(logits)
        return logits


def load_cuda_rank(bundle: Bundle, link: Collectives, options: ExecutorOptions) -> Shard:
    """A rank's runner on its GPU.

    Raises:
        HerdError: there is no GPU that works, or NCCL is missing, onnxruntime cannot run a partition there, or the
            memory is too small.
    """
    place = Place("cuda", gpu_of(link.rank))
    require_gpu(place, options)
    free = free_bytes(place)
    limit = memory_limit(place, free, options)
    stream = CudaStream(place)
    nccl = Nccl(link, plan_of(bundle), stream)
    try:
        graph = CudaRankGraph(bundle, nccl, stream, place)
        check_inputs(graph)
        calls = _call_bytes(bundle, link.rank, len(graph.partitions))
        own = cache_budget(limit, free - free_bytes(place), calls, options.cache_bytes)
        runner = CudaRank(graph, bundle, _smallest(link, own))
    except BaseException:
        nccl.watch.abort()
        raise
    return Shard(runner, graph)


def _call_bytes(bundle: Bundle, rank: int, partitions: int) -> int:
    """What is left beside weights, keys and values: for calls, and on rank 0 for the image tower, which comes last."""
    text, tower = bundle.manifest.config.text, (bundle.directory / "vision").with_suffix(WEIGHTS)
    local = plan_of(bundle).local_text(text, rank)
    rows = 2 * MOST_RECORDED  # of calls of all sizes that are recorded: 1, 2, 4, ...
    between = partitions * _CROSSING * 2 * text.hidden_size * rows
    needed = call_bytes(local) + 4 * MOST_RECORDED * text.vocab_size + partitions * _HANDLE_BYTES + between
    return needed + (tower.stat().st_size if rank == 0 and bundle.manifest.config.vision else 0)


def _smallest(link: Collectives, count: int) -> int:
    """The smallest number of all ranks, which load for different times."""
    link.barrier()
    found = np.array([count], np.int64)
    if link.rank:
        link.send(found, 0)
    else:
        for source in range(1, link.world):
            other = np.empty_like(found)
            link.receive(other, source)
            found = np.minimum(found, other)
    link.broadcast(found)
    return int(found[0])


def _element(told: str) -> str:
    """An element's type by onnxruntime's name, of which values and descriptions say more."""
    return told.removeprefix("tensor(").removesuffix(")")
