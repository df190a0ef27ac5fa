"""What TensorRT is given, small: lowered models with random weights, as float32 twins and as files to build from."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common

from herdgraph.export.graph.capture import capture_decoder
from herdgraph.export.passes import (
    ComputeIn,
    FoldWeightTransposes,
    JoinMatMuls,
    LowerExpertsDense,
    LowerExplicitAttention,
    QuantizeCachesFp8,
    QuantizeFp8,
)
from herdgraph.export.targets.tensorrt.builder import Profile
from herdgraph.export.weights.writer import stream
from herdgraph.model.config import HerdConfig
from herdgraph.model.config.presets import TINY
from herdgraph.model.quantization.recipes import RECIPES

DECODE = Profile(name="decode", batch=(1, 1, 8), slots_local=(1, 16, 16), slots_global=(1, 256, 4096))
PREFILL = Profile(name="prefill", tokens=(1, 16, 64), slots_local=(1, 16, 16), slots_global=(1, 256, 4096),
                  image_tokens=(0, 4, 64), rows=(1, 1, 64))


class Calibration:
    """Answers like a calibration of a model whose experts see inputs of different magnitudes.

    Attributes:
        experts: of a layer.
        width: of the decoder.
    """

    def __init__(self, config: HerdConfig) -> None:
        self.experts, self.width = config.text.num_experts, config.text.hidden_size

    def hessian(self, _name: str, _expert: int | None = None) -> None:
        """It has none: weights are rounded to nearest."""

    def input_amax(self, name: str) -> torch.Tensor:
        return torch.linspace(2, 9, self.experts) if ".experts." in name else torch.tensor(6.0)

    def outliers(self, name: str) -> torch.Tensor | None:
        return torch.tensor([1, 3, 7]) if name.startswith("layers.") else None

    def required_kv_amax(self, _layer: int) -> tuple[float, float]:
        return 8.0, 6.0


@cache
def captured(config: HerdConfig, capture: Callable[[HerdConfig], ir.Model]) -> ir.Model:
    return capture(config)


def twin(
    config: HerdConfig = TINY, experts: type = LowerExpertsDense, *, fp8: bool = False, fp8_caches: bool = False,
    seed: int = 0, capture: Callable[[HerdConfig], ir.Model] = capture_decoder,
) -> ir.Model:
    """The float32 graph before ``ComputeIn``, with random weights of its own."""
    model = captured(config, capture).clone()
    random = np.random.default_rng(seed)
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            noise = random.normal(size=value.shape.numpy()) / np.sqrt(max(1, value.shape.numpy()[-1]))
            value.const_value = ir.Tensor(noise.astype(np.float32), name=name)
    lower(model, config, experts, fp8=fp8, fp8_caches=fp8_caches)
    return model


def lower(
    model: ir.Model, config: HerdConfig, experts: type = LowerExpertsDense, *, fp8: bool = False,
    fp8_caches: bool = False,
) -> None:
    """The passes of a TensorRT target up to ``ComputeIn``."""
    for rewrite in (FoldWeightTransposes, JoinMatMuls, experts, LowerExplicitAttention):
        rewrite()(model)
    if fp8:
        QuantizeFp8(RECIPES["fp8"], Calibration(config))(model)  # type: ignore[arg-type]
    if fp8_caches:
        QuantizeCachesFp8(Calibration(config))(model)  # type: ignore[arg-type]
    for tidy in (common.CommonSubexpressionEliminationPass(), common.RemoveUnusedNodesPass(),
                 common.RemoveUnusedFunctionsPass(), common.RemoveUnusedOpsetsPass()):
        tidy(model)


def saved(model: ir.Model, directory: Path, name: str = "decoder", dtype: Any = ir.DataType.BFLOAT16) -> Path:
    """Round a twin and write it as a file to build from."""
    ComputeIn(dtype)(model)
    stream(model, directory, f"{name}.data")
    ir.save(model, directory / f"{name}.onnx")
    return directory / f"{name}.onnx"
