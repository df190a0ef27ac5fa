"""Builds TensorRT-RTX plans: on a CPU, for GPUs that are not there.

A plan may hold several compute capabilities at no extra size. TensorRT-RTX compiles in two steps; the second, which
chooses kernels for the GPU at hand, happens on the device when the plan is loaded.

Peak memory is about three times the weights, because TensorRT holds the model, its own copy and the plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ....errors import HerdError
from ....files import atomic_file
from ..gpus import RTX_FP8_SM, RTX_OLD_SM, RTX_SM
from .check import Check, check_plan
from .fp8_products import refuse_wrong_patterns
from .plan import VERSION, Plan

_DIMENSIONS = ("batch", "tokens", "slots_local", "slots_global", "image_tokens", "rows", "tiles")

Range = tuple[int, int, int]
"""Smallest, most usual and largest size of a dimension."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Sizes that a plan is made for; the fields are the names of the graphs' dimensions.

    Attributes:
        name: ``decode``, ``prefill`` or ``images``; a runtime takes the first profile that a call fits.
        batch: sequences.
        tokens: new tokens of each.
        slots_local: cache slots of chunked layers.
        slots_global: cache slots of layers that see their whole past.
        image_tokens: rows of image features, which may be none.
        rows: positions whose logits are wanted.
        tiles: pictures' tiles, for the image graph.
    """

    name: str
    batch: Range = (1, 1, 1)
    tokens: Range = (1, 1, 1)
    slots_local: Range = (1, 1, 1)
    slots_global: Range = (1, 1, 1)
    image_tokens: Range = (0, 0, 0)
    rows: Range = (1, 1, 1)
    tiles: Range = (1, 1, 1)

    def shape(self, dims: ir.Shape) -> tuple[tuple[int, ...], ...]:
        """Smallest, most usual and largest shape of an input."""
        return tuple(
            tuple(dim if isinstance(dim, int) else getattr(self, str(dim.value))[step] for dim in dims)
            for step in range(3)
        )

    def to_json(self) -> dict[str, Any]:
        """For the manifest: ``{"name": "decode", "batch": [1, 1, 8], ...}``."""
        return {"name": self.name} | {name: list(getattr(self, name)) for name in _DIMENSIONS}


def build_plan(
    onnx_path: Path, output: Path, *, sm: Sequence[str] = ("89", "120"), profiles: Sequence[Profile],
    allow_fallback: bool = False,
) -> Check:
    """Build one plan for several GPUs, read it back, and keep it if it is what the model meant.

    Args:
        onnx_path: strongly typed ONNX model, its external data beside it.
        output: the plan; it appears when it is complete and checked.
        sm: compute capabilities, such as ``("89", "120")``.
        profiles: sizes that it must run with.
        allow_fallback: keep a plan in which FP8 products became 16-bit ones.

    Returns:
        What was proved of the plan.

    Raises:
        HerdError: a compute capability that cannot be built for, no ``tensorrt_rtx``, what TensorRT objects to, or a
            plan that is not what the model meant.
    """
    model = ir.load(onnx_path)
    check_targets(sm, fp8=_has_fp8(model))
    refuse_wrong_patterns(model)
    data = Build(load_tensorrt_rtx()).run(onnx_path, model, sm, profiles)
    with appearing(output) as temporary:
        temporary.write_bytes(memoryview(data))
        del data
        return check_plan(model, Plan.read(temporary), sm, allow_fallback=allow_fallback)


def check_targets(sm: Sequence[str], *, fp8: bool) -> None:
    """Refuse compute capabilities that a plan cannot be built for here.

    Raises:
        HerdError: says why, and what to do.
    """
    if not sm:
        raise HerdError(f"no compute capability was given: choose among {', '.join(RTX_SM)}")
    for target in sm:
        if target in RTX_OLD_SM and fp8:
            raise HerdError(f"SM {target} has no FP8 arithmetic: build for SM {', '.join(RTX_FP8_SM)}, or with recipe "
                            "bf16")
        if target not in RTX_SM:
            raise HerdError(f"SM {target} is not among those that TensorRT-RTX compiles for without the GPU "
                            f"({', '.join(RTX_SM)}): build with --target tensorrt on a machine that has it")


def load_tensorrt_rtx() -> Any:
    """The ``tensorrt_rtx`` module.

    Raises:
        HerdError: it is not installed, or another version.
    """
    try:
        import tensorrt_rtx
    except ImportError as error:
        raise HerdError("tensorrt_rtx is not installed: pip install 'herdgraph[tensorrt-rtx]'") from error
    if tensorrt_rtx.__version__ != VERSION:
        raise HerdError(f"tensorrt_rtx is version {tensorrt_rtx.__version__}, plans of {VERSION} are understood here: "
                        "pip install 'herdgraph[tensorrt-rtx]'")
    return tensorrt_rtx


def logger_of(trt: Any) -> Any:
    """A TensorRT logger that keeps errors for a message and prints nothing."""

    class Errors(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.messages.append(" ".join(message.split())[:400])

    return Errors()


class Build:
    """One build; holds TensorRT's objects, each of which needs the ones before it."""

    def __init__(self, trt: Any) -> None:
        self.trt, self.logger = trt, logger_of(trt)
        self.builder = trt.Builder(self.logger)
        self.network = self.builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))

    def run(self, onnx_path: Path, model: ir.Model, sm: Sequence[str], profiles: Sequence[Profile]) -> Any:
        """Parse and compile; returns TensorRT's buffer."""
        parser = parse(self.trt, self.network, self.logger, onnx_path)
        config = self.builder.create_builder_config()
        # Float32 products are the routers': TF32 would round what they read to 10 bits.
        config.clear_flag(self.trt.BuilderFlag.TF32)
        if sm:  # none: the GPU at hand
            config.num_compute_capabilities = len(sm)
        for index, target in enumerate(sm):
            config.set_compute_capability(getattr(self.trt.ComputeCapability, f"SM{target}"), index)
        for profile in profiles:
            config.add_optimization_profile(self._profile(model, profile))
        data = self.builder.build_serialized_network(self.network, config)
        del parser  # it owns weights that the network refers to
        if data is None:
            raise HerdError(f"{self.trt.__name__} {self.trt.__version__} cannot build {onnx_path.name}: "
                            f"{reasons(self.logger)}")
        return data

    def _profile(self, model: ir.Model, profile: Profile) -> Any:
        made = self.builder.create_optimization_profile()
        for value in model.graph.inputs:
            assert value.shape is not None
            if any(not isinstance(dim, int) for dim in value.shape):
                made.set_shape(str(value.name), *profile.shape(value.shape))
        return made


def parse(trt: Any, network: Any, logger: Any, onnx_path: Path) -> Any:
    """Read an ONNX file into a network. Returns the parser, which has to outlive the build.

    Raises:
        HerdError: what the parser objects to, with the node's name.
    """
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx_path)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        told = [f"{error.node_name() or error.node_operator()}: {' '.join(error.desc().split())}" for error in errors]
        raise HerdError(f"TensorRT cannot read {onnx_path.name}: {told[0] if told else reasons(logger)}")
    return parser


def reasons(logger: Any) -> str:
    """TensorRT's own words, in one line."""
    return "; ".join(dict.fromkeys(logger.messages)) or "it gave no reason"


def _has_fp8(model: ir.Model) -> bool:
    values = (*model.graph.initializers.values(), *model.graph.inputs)
    return any(value.dtype == ir.DataType.FLOAT8E4M3FN for value in values)


@contextmanager
def appearing(output: Path) -> Iterator[Path]:
    """A temporary name beside ``output`` that becomes it when the block ends without an error."""
    try:
        with atomic_file(output) as temporary:
            yield temporary
    except OSError as error:
        raise HerdError(f"{output} cannot be written: {error.strerror}; choose another output or make room") from error
