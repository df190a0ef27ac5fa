"""Runs a graph on the hollow device; started with the Python that has onnxruntime-gpu, so it imports nothing of ours.

``worker.py LIBRARIES JOB``: JOB is a JSON file of models, calls (``device.Call``) and options. What happens goes to the
file HOLLOW_CUDA_LOG, between marks ``CALL/PHASE``. An error of ONNX Runtime is printed as the last line, with exit
status 3.
"""

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

LOAD_ORDER = ("libcuda.so.1", "libcudart.so.13", "libcublasLt.so.13", "libcublas.so.13", "libcurand.so.10")
TYPES = {"float": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7, "bool": 9, "float16": 10, "bfloat16": 16,
         "float8e4m3fn": 17}
"""Names that a session gives its inputs, by ONNX's numbers."""
NUMPY = {"int32": np.int32, "int64": np.int64, "float": np.float32}
EAGER = "-1"
"""The id of the graph that is never recorded."""


def load_libraries(directory: Path) -> Any:
    """Loaded first, so that the provider finds them under their names."""
    return [ctypes.CDLL(str(directory / name), mode=ctypes.RTLD_GLOBAL) for name in LOAD_ORDER][1]


class Runner:
    """One session, and its calls one after the other."""

    def __init__(self, mark: Any, job: dict[str, Any], model: str) -> None:
        import onnxruntime as ort

        self.ort, self.mark, self.job = ort, mark, job
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        for name, value in job["session"].items():
            options.add_session_config_entry(name, value)
        self.records = any(call["record"] for call in job["calls"])
        provider = {"enable_cuda_graph": "1"} if self.records else {}
        self.mark(b"load")
        self.session = ort.InferenceSession(
            model, options, providers=[("CUDAExecutionProvider", provider | job["provider"])])
        if "CUDAExecutionProvider" not in self.session.get_providers():
            raise RuntimeError("the CUDA provider was not loaded")

    def call(self, number: int, call: dict[str, Any]) -> None:
        """Eagerly twice, because the first time measures tactics; then recorded and replayed if that is asked for."""
        self.mark(f"{call['name']}/bind".encode())
        binding, kept = self._bind(call)
        phases = [("first", EAGER), ("eager", EAGER)]
        if call["record"]:
            phases += [("record", str(number)), ("replay", str(number))]
        for phase, graph in phases:
            options = self.ort.RunOptions()
            if self.records:
                options.add_run_config_entry("gpu_graph_id", graph)
            self.mark(f"{call['name']}/{phase}".encode())
            self.session.run_with_iobinding(binding, options)
        self.mark(b"between")
        del kept

    def _bind(self, call: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Inputs and outputs at fixed addresses; ``present.*`` is where ``past.*`` is."""
        binding, buffers = self.session.io_binding(), {}
        places = [info.name for info in self.session.get_input_memory_infos()]
        for item, place in zip(self.session.get_inputs(), places, strict=True):
            buffers[item.name] = self._input(item, call, on_host=place == "Cpu")
            binding.bind_ortvalue_input(item.name, buffers[item.name])
        for item in self.session.get_outputs():
            cache = item.name.replace("present.", "past.", 1)
            if cache not in buffers or cache == item.name:
                buffers[cache] = self._empty(item, call)
            binding.bind_ortvalue_output(item.name, buffers[cache])
        return binding, buffers

    def _input(self, item: Any, call: dict[str, Any], on_host: bool) -> Any:
        values = call["values"].get(item.name)
        if values is None:
            return self._empty(item, call)
        array = np.array(values, NUMPY[_type(item)])
        if on_host:  # the session says so: kernels read it there
            return self.ort.OrtValue.ortvalue_from_numpy(array)
        return self.ort.OrtValue.ortvalue_from_numpy(array, "cuda", 0)

    def _empty(self, item: Any, call: dict[str, Any]) -> Any:
        shape = [dim if isinstance(dim, int) else call["dims"][dim] for dim in item.shape]
        return self.ort.OrtValue.ortvalue_from_shape_and_type(shape, TYPES[_type(item)], "cuda", 0)


def _type(item: Any) -> str:
    return str(item.type).removeprefix("tensor(").removesuffix(")")


def main() -> None:
    """See the module."""
    runtime = load_libraries(Path(sys.argv[1]))
    job = json.loads(Path(sys.argv[2]).read_text())
    try:
        for model in job["models"]:
            runner = Runner(runtime.hollow_mark, job, model)
            for number, call in enumerate(job["calls"]):
                runner.call(number, call)
    except Exception as error:
        if "onnxruntime" not in type(error).__module__ and "Error in execution" not in str(error):
            raise
        print(" ".join(str(error).split()))
        sys.exit(3)


if __name__ == "__main__":
    main()
