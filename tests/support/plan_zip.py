"""Target of plans that ``host_tensorrt.py`` runs: those of TensorRT-RTX in float32, collectives between partitions."""

from __future__ import annotations

import json
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import InPlacePass
from onnx_ir.passes.common import ShapeInferencePass

from herdgraph.export.passes import ComputeIn, LowerCollectives
from herdgraph.export.passes.shard.partition import partition_at_collectives
from herdgraph.export.targets.options import PlanOptions
from herdgraph.export.targets.target import WritePlan
from herdgraph.export.targets.tensorrt.builder import Profile
from herdgraph.export.targets.tensorrt.plan import VERSION
from herdgraph.export.targets.tensorrt.plans import write_plan
from herdgraph.export.targets.tensorrt.target import TENSORRT_RTX, TensorRtRtxTarget
from herdgraph.model.quantization.recipes import Recipe


class PlanZip(TensorRtRtxTarget):
    """Lowers as TensorRT-RTX's target, but for what only TensorRT understands."""

    def pipeline(self, recipe: Recipe, options: PlanOptions, calibration: Any = None) -> list[InPlacePass]:
        return [step for step in super().pipeline(recipe, options, calibration)
                if not isinstance(step, (ComputeIn, LowerCollectives))]

    def plan_writer(self, recipe: Recipe, options: PlanOptions) -> WritePlan:
        del recipe
        return partial(write_plan, options=options, build=build)


PLAN_ZIP = PlanZip(TENSORRT_RTX.name, TENSORRT_RTX.purpose, TENSORRT_RTX.executor, TENSORRT_RTX.provider)


def build(onnx: Path, plan: Path, profiles: list[Profile]) -> dict[str, Any]:
    """As ``build_plan``, what the manifest says included."""
    model = ir.load(onnx)
    width = max((node.attributes["width"].as_int() for node in model.graph if "width" in node.attributes), default=1)
    for name, value in model.graph.initializers.items():
        assert value.const_value is not None
        value.const_value = ir.Tensor(value.const_value.numpy().copy(), name=name)
    model.functions.clear()  # to the cut a collective is not what it is for one rank, its function
    ShapeInferencePass()(model)
    partitions = partition_at_collectives(model)
    exchanges = [[(one.op, one.value, one.result) for one in partition.after] for partition in partitions]
    with zipfile.ZipFile(plan, "w") as archive:
        described = {"exchanges": exchanges, "width": width, "profiles": [profile.to_json() for profile in profiles]}
        archive.writestr("plan.json", json.dumps(described))
        for index, partition in enumerate(partitions):
            archive.writestr(str(index), ir.to_proto(partition.model).SerializeToString())
    return {"tensorrt": VERSION, "sm": ["89"]}
