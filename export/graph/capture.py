"""Capture: the torch modules as a canonical ONNX graph, without a single weight in memory.

The modules are built and traced under ``FakeTensorMode``, so that a 400-billion-parameter decoder is captured on a
laptop. The graph's initializers keep checkpoint names and are then bound to lazy ``Weight`` tensors.

Canonical graphs are float32 in ONNX opset 24. Inputs and outputs:

========================  ==============================  =============================================
decoder input             shape                           meaning
========================  ==============================  =============================================
``input_ids``             int64 [batch, tokens]           token ids, the image token where features go
``image_features``        float [image_tokens, width]     only with an image tower; may have 0 rows
``past_lengths``          int64 [batch]                   tokens each sequence already holds
``logit_rows``            int64 [rows]                    positions whose logits are wanted
``past.{i}.key|value``    float [batch, G, slots_i, K]    cache of layer i, see ``CachedAttention``
========================  ==============================  =============================================

Outputs ``logits`` [batch, rows, vocabulary] and ``present.{i}.key|value``. The vision graph maps ``pixel_values``
[tiles, 3, H, W] to ``image_features`` [tiles · tokens per tile, width].
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript import optimizer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ...model.checkpoint.reader import TensorReader
from ...model.config import HerdConfig
from ...model.llama4.decoder import Decoder, KVCache
from ...model.llama4.model import constants
from ...model.llama4.operators import OPSET
from ...model.llama4.vision import VisionTower
from ..weights.stream import Weight
from .functions import attach_bodies
from .naming import name_after_modules

_DYNAMIC = torch.export.Dim.DYNAMIC


def capture_decoder(config: HerdConfig) -> ir.Model:
    """The canonical decoder graph, its weights unbound."""
    text = config.text
    with FakeTensorMode():
        module = Decoder(config).eval()
        # Sample sizes differ from each other and from 0 and 1, which torch.export would take for constants.
        caches = [
            KVCache(*(torch.zeros(2, text.num_kv_heads, 7 + layer, text.head_dim) for _ in KVCache._fields))
            for layer in range(text.num_layers)
        ]
        features = torch.zeros(5, text.hidden_size) if config.vision else None
        ids, lengths, rows = (torch.zeros(size, dtype=torch.int64) for size in ((2, 3), (2,), (4,)))
        dynamic = (
            {0: _DYNAMIC, 1: _DYNAMIC},
            {0: _DYNAMIC} if config.vision else None,
            {0: _DYNAMIC},
            [KVCache._make([{0: _DYNAMIC, 2: _DYNAMIC}] * 2) for _ in caches],
            {0: _DYNAMIC},
        )
        program = _export(module, (ids, features, lengths, caches, rows), dynamic)
    model = _to_onnx(program, module, constants(config, module))
    image = ["image_features"] if config.vision else []
    past = [f"past.{layer}.{part}" for layer in range(text.num_layers) for part in ("key", "value")]
    inputs = ["input_ids", *image, "past_lengths", *past, "logit_rows"]
    _name_interface(model, inputs, ["logits", *(name.replace("past", "present") for name in past)])
    slots = {f"{kind}.{name[5:]}": f"slots_{name.split('.')[1]}" for name in past for kind in ("past", "present")}
    _name_dimensions(model, {name: ("batch", None, dim, None) for name, dim in slots.items()})
    _name_dimensions(model, {
        "input_ids": ("batch", "tokens"), "past_lengths": ("batch",), "logit_rows": ("rows",),
        "image_features": ("image_tokens", None), "logits": ("batch", "rows", None),
    })
    return model


def capture_vision(config: HerdConfig) -> ir.Model:
    """The canonical image graph, its weights unbound."""
    assert config.vision is not None, "a text-only configuration has no image tower"
    side = config.vision.image_size
    with FakeTensorMode():
        module = VisionTower(config).eval()
        program = _export(module, (torch.zeros(2, config.vision.num_channels, side, side),), ({0: _DYNAMIC},))
    model = _to_onnx(program, module, constants(config, module))
    _name_interface(model, ["pixel_values"], ["image_features"])
    _name_dimensions(model, {
        "pixel_values": ("tiles", None, None, None), "image_features": ("image_tokens", None),
    })
    return model


def bind_weights(model: ir.Model, source: TensorReader) -> None:
    """Bind every initializer without a value to the checkpoint tensor of its name, which is not read yet."""
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            assert value.shape is not None
            value.const_value = Weight(source, name, value.shape.numpy())


def _export(module: nn.Module, arguments: tuple[Any, ...], dynamic: tuple[Any, ...]) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(module, arguments, dynamic_shapes=dynamic, strict=False)


def _to_onnx(
    program: torch.export.ExportedProgram, module: nn.Module, known: Mapping[str, torch.Tensor]
) -> ir.Model:
    """Translate, bind the module's constants, and tidy: no weight is touched."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        exported = torch.onnx.export(program, dynamo=True, opset_version=OPSET, optimize=False, verbose=False)
    assert exported is not None
    model = exported.model
    for name, value in model.graph.initializers.items():
        constant = known.get(name)
        value.const_value = None if constant is None else ir.Tensor(constant.numpy(), name=name)
    optimizer.fold_constants(model)
    for tidy in (common.RemoveUnusedNodesPass(), common.CommonSubexpressionEliminationPass()):
        tidy(model)
    attach_bodies(model)
    model.producer_name = "herdgraph"
    name_after_modules(model)
    return model


def _name_interface(model: ir.Model, inputs: list[str], outputs: list[str]) -> None:
    graph = model.graph
    assert len(graph.inputs) == len(inputs), f"{len(graph.inputs)} graph inputs for {len(inputs)} names"
    assert len(graph.outputs) == len(outputs), f"{len(graph.outputs)} graph outputs for {len(outputs)} names"
    for value, name in zip((*graph.inputs, *graph.outputs), (*inputs, *outputs), strict=True):
        value.name = name


def _name_dimensions(model: ir.Model, dimensions: Mapping[str, tuple[str | None, ...]]) -> None:
    """Name the sizes of inputs and outputs, and with them those of everything between."""
    known: dict[str, str] = {}
    for value in (*model.graph.inputs, *model.graph.outputs):
        names = dimensions.get(value.name or "")
        if names is not None:
            assert value.shape is not None
            known |= {str(dim): name for name, dim in zip(names, value.shape, strict=True) if name}
            value.shape = ir.Shape([name or dim for name, dim in zip(names, value.shape, strict=True)])
    for value in (output for node in model.graph for output in node.outputs if output.shape is not None):
        value.shape = ir.Shape([_renamed(dim, known) for dim in value.shape or ()])


def _renamed(dim: int | ir.SymbolicDim, known: Mapping[str, str]) -> int | str | None:
    """A dimension in the names of the interface: ``s16*s19`` is ``batch*tokens``."""
    if isinstance(dim, int) or dim.value is None:
        return dim if isinstance(dim, int) else None
    return re.sub(r"\w+", lambda match: known.get(match[0], match[0]), str(dim.value))
