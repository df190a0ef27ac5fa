"""A stand-in for a plan on a GPU: it runs the float32 graph that the plan is built from."""

from __future__ import annotations

from collections.abc import Sequence as Items
from copy import copy
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from herdgraph.runtimes.executors.tensorrt import Call, Limits
from herdgraph.runtimes.kv_cache.memory import HostMemory

DECODE = {"batch": (1, 8), "tokens": (1, 1), "slots_local": (1, 16), "slots_global": (1, 512), "rows": (1, 1),
          "image_tokens": (0, 0)}
PREFILL = DECODE | {"batch": (1, 1), "tokens": (1, 24), "rows": (1, 24), "image_tokens": (0, 64)}


class Twin:
    """Runs the graph that a plan is built from, before it is rounded to 16 bits."""

    def __init__(self, model: ir.Model, profiles: Items[Limits] = (DECODE, PREFILL), dtype: Any = np.float32) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        proto = ir.to_proto(model).SerializeToString()
        self.session = onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
        self.memory, self.profiles, self.calls = HostMemory(dtype), profiles, []
        self.takes_features = any(item.name == "image_features" for item in self.session.get_inputs())

    def run(self, call: Call) -> np.ndarray:
        self.calls.append(call)
        io = self.session.io_binding()
        for name, array in call.inputs.items():
            io.bind_cpu_input(name, array)
        for layer, buffers in enumerate(call.caches):
            for part, buffer in zip(("key", "value"), buffers, strict=True):
                io.bind_ortvalue_input(f"past.{layer}.{part}", self._value(buffer))
        for item in self.session.get_outputs():
            io.bind_output(item.name)
        self.session.run_with_iobinding(io)
        names = [item.name for item in self.session.get_outputs()]
        found = dict(zip(names, io.get_outputs(), strict=True))
        for layer, (buffers, slots) in enumerate(zip(call.caches, call.first_slots, strict=True)):
            for part, buffer in zip(("key", "value"), buffers, strict=True):
                new = self._array(found[f"new.{layer}.{part}"], buffer)
                for row, slot in enumerate(slots):
                    buffer[row, :, slot : slot + new.shape[2]] = new[row]
        return found["logits"].numpy()

    def close(self) -> None:
        """There is nothing that has to be let go of in order."""

    def with_profiles(self, profiles: Items[Limits]) -> Twin:
        other = copy(self)
        other.profiles = profiles
        return other

    def _value(self, buffer: np.ndarray) -> Any:
        array = np.ascontiguousarray(buffer)
        if self.memory.dtype is np.uint8:
            code = onnx.TensorProto.FLOAT8E4M3FN
            return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, code)
        return onnxruntime.OrtValue.ortvalue_from_numpy(array)

    def _array(self, value: Any, like: np.ndarray) -> np.ndarray:
        if like.dtype != np.uint8:
            return value.numpy()
        shape = tuple(value.shape())
        return np.ctypeslib.as_array((np.ctypeslib.ctypes.c_uint8 * int(np.prod(shape))).from_address(
            value.data_ptr())).reshape(shape).copy()
