"""One plan for all layers of a kind: the logits of the whole plan, with weights that lie outside of the plans."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from herdgraph.errors import HerdError
from herdgraph.export.graph.capture import bind_weights, capture_decoder
from herdgraph.export.passes import KeepStage
from herdgraph.export.passes.shard.partition import remove_ends
from herdgraph.export.targets.tensorrt.weights_as_inputs import WeightsAsInputs
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.config import HerdConfig
from herdgraph.model.config.shard_plan import ShardPlan
from herdgraph.runtimes.executors.tensorrt import PlanRunner
from herdgraph.runtimes.executors.tensorrt.device import DeviceExecutor
from herdgraph.runtimes.executors.tensorrt.layer_walk import LayerWalk, Step
from support import herds, host_tensorrt, plans
from support.plan_twin import DECODE, PREFILL, Twin

ROTATES = (True, False, True, True, False, True)
CONFIG = herds.variant(num_layers=6, moe_layers=(0, 1, 2, 3, 4, 5), rope_layers=ROTATES, chunked_layers=ROTATES)
KINDS = ["first", "global", "chunked", "chunked", "global", "last"]
"""Of each layer: the ends have embedding and head with them, and two kinds lie between."""
PROFILES = (DECODE | {"slots_local": (1, 16)}, PREFILL)

Weights = dict[str, np.ndarray]


class Layers:
    """What a build would leave: a graph of each layer without its weights, and the weights."""

    def __init__(self, config: HerdConfig, checkpoint: Path) -> None:
        captured = capture_decoder(config)
        with open_checkpoint(checkpoint) as source:
            self.whole = Twin(self._lowered(captured.clone(), config, source), PROFILES)
            self.graphs, self.weights = zip(*self._stages(captured, config, source), strict=True)

    def _stages(self, captured: ir.Model, config: HerdConfig, source: Any) -> Iterator[tuple[ir.Model, Weights]]:
        count = config.text.num_layers
        for stage in range(count):
            model = captured.clone()
            KeepStage(ShardPlan(pipeline=count), stage, count)(model)
            remove_ends(model.graph)
            self._lowered(model, config, source)
            free = WeightsAsInputs()
            free(model)
            yield model, {name: tensor.numpy().view(np.uint8) if ".codes" in name else tensor.numpy()
                          for name, tensor in free.weights.items()}

    @staticmethod
    def _lowered(model: ir.Model, config: HerdConfig, source: Any) -> ir.Model:
        bind_weights(model, source)
        plans.lower(model, config, fp8=True)
        return model


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> Layers:
    checkpoint = tmp_path_factory.mktemp("layers") / "checkpoint"
    herds.save(CONFIG, checkpoint)
    return Layers(CONFIG, checkpoint)


class Loader:
    """Loads plans of layers onto one imitated GPU."""

    def __init__(self, layers: Layers, directory: Path) -> None:
        self.layers, self.cuda = layers, host_tensorrt.host_gpu()
        self.engines: list[host_tensorrt.HostEngine] = []
        self.file = directory / "p.plan"
        self.file.write_bytes(b"plan")

    def plan(self, layer: int) -> DeviceExecutor:
        session = host_tensorrt.session_of(ir.to_proto(self.layers.graphs[layer]).SerializeToString())
        engine = host_tensorrt.HostEngine([(session, [])], PROFILES)
        self.engines.append(engine)
        return DeviceExecutor(self.file, package=host_tensorrt.package(engine), cuda=self.cuda,
                              chunks=(CONFIG.text.chunk_of(layer),))

    def walk(self, shared: dict[str, DeviceExecutor] | None) -> PlanRunner:
        """All layers; of a shared plan there is one, built for the first layer of its kind."""
        steps = []
        for layer, kind in enumerate(KINDS):
            plan = self.plan(layer) if shared is None else shared.get(kind) or shared.setdefault(kind, self.plan(layer))
            steps.append(Step.of(plan, layer, self.layers.weights[layer]))
        return PlanRunner(LayerWalk(steps, CONFIG.text.hidden_size), CONFIG)


def _logits(runner: PlanRunner) -> list[np.ndarray]:
    none = np.zeros((0, CONFIG.text.hidden_size), np.float32)
    sequences = [runner.new_sequence() for _ in range(3)]
    found = [runner.prefill(sequence, herds.tokens(20 + 14 * seed, seed), none, all_positions=True)
             for seed, sequence in enumerate(sequences)]
    found += [runner.decode_batch(sequences, herds.tokens(3, 50 + step)) for step in range(4)]
    return [*found, runner.decode(sequences[1].fork(), 9)]


def test_one_plan_serves_all_layers_of_its_kind(layers: Layers, tmp_path: Path) -> None:
    loader = Loader(layers, tmp_path)
    shared = loader.walk({})
    assert len(loader.engines) == 4
    found, own = _logits(shared), _logits(Loader(layers, tmp_path).walk(None))
    for ours, theirs in zip(found, own, strict=True):
        np.testing.assert_array_equal(ours, theirs, "as with a plan for every layer")
    for ours, wanted in zip(found, _logits(PlanRunner(layers.whole, CONFIG)), strict=True):
        # x · (1 / s) is not rounded like x / s: a few inputs fall on the other side of a code's boundary.
        assert np.abs(ours - wanted).mean() < 0.03 * np.abs(wanted).mean()
    runs = [engine.runs for engine in loader.engines]
    assert runs == [runs[0], 2 * runs[0], 2 * runs[0], runs[0]]


def test_weights_are_in_memory_once(layers: Layers, tmp_path: Path) -> None:
    loader = Loader(layers, tmp_path)
    runner = loader.walk({})
    before = sum(len(block) for block in loader.cuda.runtime.alive.values())
    assert before > sum(array.nbytes for weights in layers.weights for array in weights.values())
    del runner
    assert len(loader.cuda.runtime.alive) < 10


def test_sizes_are_those_that_all_plans_take(layers: Layers, tmp_path: Path) -> None:
    walk = Loader(layers, tmp_path).walk({}).executor
    wanted = [{name: limits for name, limits in profile.items() if name != "image_tokens"} for profile in PROFILES]
    assert walk.profiles == wanted


def test_weights_of_another_kind_of_layer(layers: Layers, tmp_path: Path) -> None:
    plan = Loader(layers, tmp_path).plan(1)
    weights = {name.replace("layers.2.", "layers.4."): array for name, array in layers.weights[2].items()}
    name, array = next((name, array) for name, array in weights.items() if "router" in name)
    with pytest.raises(HerdError, match=r"the plan takes layers\.4\..*router.*, which is not among the weights of"):
        Step.of(plan, 4, {key: value for key, value in weights.items() if key != name})
    with pytest.raises(HerdError, match=r"router.* has \d+ bytes, the plan takes \d+, \[.*\] of float32: build the"):
        Step.of(plan, 4, weights | {name: array[:1]})
