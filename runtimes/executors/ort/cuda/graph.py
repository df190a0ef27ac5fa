"""A decoder's graph on a GPU, ready to be bound: the whole of it in one session."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from ..session import Values, load_onnxruntime
from .views import Place

NOT_RECORDED = -1
"""In the place of a recording's number: a call that runs without one."""

Run = Callable[[], None]


class CudaGraph(Protocol):
    """A decoder graph: one session, or a rank's partitions with collectives between them.

    Attributes:
        path: the file, for messages.
        place: the GPU.
        outputs: names.
    """

    path: Path
    place: Place
    outputs: frozenset[str]

    @property
    def inputs(self) -> Items[Any]:
        """ONNX Runtime's descriptions of the inputs: name, type, shape."""

    def bind(self, inputs: Values, outputs: Values, recording: int) -> Run:
        """A call over fixed memory: what is written there later is what the next call reads.

        Args:
            inputs: by name.
            outputs: by name; all that the graph has.
            recording: a number for a call that will come again, and that may be recorded as a CUDA graph.
        """


class WholeGraph:
    """A decoder in one session, which records by itself; see ``CudaGraph``."""

    def __init__(self, session: Any, path: Path, place: Place) -> None:
        self._session, self.path, self.place = session, path, place
        self.outputs = frozenset(item.name for item in session.get_outputs())

    @property
    def inputs(self) -> Items[Any]:
        """See ``CudaGraph``."""
        inputs: Items[Any] = self._session.get_inputs()
        return inputs

    def bind(self, inputs: Values, outputs: Values, recording: int) -> Run:
        """See ``CudaGraph``: the first time of a recorded call records it."""
        io, options = self._session.io_binding(), load_onnxruntime().RunOptions()
        for name, value in inputs.items():
            io.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            io.bind_ortvalue_output(name, value)
        if self.place.kind == "cuda":
            options.add_run_config_entry("gpu_graph_id", str(recording))
        return partial(self._session.run_with_iobinding, io, options)
