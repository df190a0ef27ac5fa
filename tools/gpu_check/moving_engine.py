"""Stands in for TensorRT's engine and its context: it moves bytes on the GPU's stream, and computes nothing.

Of B sequences with T new tokens each, as the plan of a decoder with one layer would have them:

    logits float32 [B, 1, 2]        the 8 bytes of the last token's id
    new.0.key [B, GROUPS, T, HEAD]  the 8 bytes of every token's id, for every head
    new.0.value                     the first T slots of the cached keys
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

GROUPS, HEAD = 2, 4
"""Heads of keys, and their width, of 2 bytes an element: 8 bytes a slot, as many as a token's id has."""
_ID = 8
_OUTPUTS = ("logits", "new.0.key", "new.0.value")
_TENSORS = {"input_ids": "INT64", "past_lengths": "INT64", "logit_rows": "INT64", "past.0.key": "BF16",
            "past.0.value": "BF16", "logits": "FLOAT", "new.0.key": "BF16", "new.0.value": "BF16"}
_BYTES = {"INT64": 8, "FLOAT": 4, "BF16": 2}
_MOST = {"input_ids": (4, 64), "logit_rows": (4,), "past.0.key": (4, GROUPS, 64, HEAD)}


class MovingEngine:
    """Engine and context in one, with the names that TensorRT has for what ``DeviceExecutor`` calls."""

    num_io_tensors, num_optimization_profiles = len(_TENSORS), 1

    def __init__(self, cuda: Any) -> None:
        self._cuda = cuda
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def create_execution_context(self) -> MovingEngine:
        """Itself."""
        return self

    def get_tensor_name(self, index: int) -> str:
        """Inputs first."""
        return list(_TENSORS)[index]

    def get_tensor_mode(self, name: str) -> str:
        """As ``package_of`` calls the modes."""
        return "output" if name in _OUTPUTS else "input"

    def get_tensor_dtype(self, name: str) -> Any:
        """Name and bytes of an element."""
        return SimpleNamespace(name=_TENSORS[name], itemsize=_BYTES[_TENSORS[name]])

    def get_tensor_profile_shape(self, name: str, profile: int) -> tuple[tuple[int, ...], ...]:
        """Least, usual and most."""
        del profile
        return (1,) * len(_MOST[name]), _MOST[name], _MOST[name]

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        """Of the next call."""
        self._shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        """Of the next call."""
        self._addresses[name] = pointer
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """Of an output, which follows from the inputs'."""
        batch, tokens = self._shapes["input_ids"]
        return (batch, 1, _ID // 4) if name == "logits" else (batch, GROUPS, tokens, HEAD)

    def execute_async_v3(self, stream: int) -> bool:
        """Put the copies on the stream."""
        assert stream == int(self._cuda.stream)
        (batch, tokens), at, copy = self._shapes["input_ids"], self._addresses, self._cuda.copy_rows
        row, slots = tokens * _ID, self._shapes["past.0.key"][2] * _ID
        copy(at["input_ids"] + row - _ID, row, at["logits"], _ID, _ID, batch)
        for group in range(GROUPS):
            copy(at["input_ids"], row, at["new.0.key"] + group * row, GROUPS * row, row, batch)
        copy(at["past.0.key"], slots, at["new.0.value"], row, row, batch * GROUPS)
        return True


def package_of(engine: MovingEngine) -> Any:
    """What ``import tensorrt`` would give: it loads one engine, whatever the plan."""
    logger = type("Logger", (), {"ERROR": 1, "__init__": lambda self, _: None})
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda _: engine)
    return SimpleNamespace(__name__="a stand-in", __version__="", Logger=logger, Runtime=lambda _: runtime,
                           TensorIOMode=SimpleNamespace(OUTPUT="output"))
