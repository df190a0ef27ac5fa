"""The runner of the target ``cuda`` on a CPU: its graph in float32, with attention of standard operators."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import onnxruntime
import pytest

from herdgraph.export.graph.capture import bind_weights, capture_decoder
from herdgraph.export.passes import LowerPagedContrib
from herdgraph.export.targets.cuda import CUDA
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.config import HerdConfig
from herdgraph.model.quantization.recipes import RECIPES
from herdgraph.runtimes.executors.ort.cuda.graph import WholeGraph
from herdgraph.runtimes.executors.ort.cuda.runner import CudaRunner
from herdgraph.runtimes.executors.ort.cuda.views import Place
from support import contrib_attention


def twin_runner(model: ir.Model, config: HerdConfig, cache_bytes: int = 16 << 20) -> CudaRunner:
    """The runner over a canonical graph, which is lowered in place."""
    if not hasattr(onnxruntime.OrtValue, "from_dlpack"):
        pytest.skip("this onnxruntime takes no parts of values, which came with 1.31")
    for rewrite in (*CUDA.twin(RECIPES["fp32"]), LowerPagedContrib("float")):
        rewrite(model)
    contrib_attention.expand(model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return CudaRunner(WholeGraph(session, Path("twin.onnx"), Place("cpu")), config, cache_bytes)


def twin_of_checkpoint(directory: Path, config: HerdConfig, cache_bytes: int = 16 << 20) -> CudaRunner:
    """The same with a checkpoint's weights."""
    model = capture_decoder(config)
    with open_checkpoint(directory) as checkpoint:
        bind_weights(model, checkpoint)
        return twin_runner(model, config, cache_bytes)
