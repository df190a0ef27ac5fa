"""Reads a TensorRT-RTX plan on a CPU: header, and the compiler's own text of what will run.

NVIDIA does not document the format; this is what plans of TensorRT-RTX 1.7.1.116 hold, and other versions are refused.

======  =====  ==========================================================================
offset  bytes  header, little-endian
======  =====  ==========================================================================
0       4      ``vtrt``
8       8      serialisation version, 2
16      8      size of the whole plan
24      4      TensorRT-RTX version, one byte per part
32      8      bit mask of the compute capabilities that it runs on, see ``CAPABILITIES``
======  =====  ==========================================================================

Behind it lie, among weights and CUDA sources, one text per compiled graph (Myelin IR), ended by a zero byte. A network
gives one graph per optimisation profile, or several where shapes depend on data; what a fusion replaces is a small
graph of its own. All profiles share the weights in the file. Of its lines these are read:

    inputs={ "past.0.key.1" ... }    outputs={ ... }    accelerators={sm89 sm120 }
    tensor={ ... const_payload_size=8192 dims={ 64 128 } ... name="..." ... type=fp8_e4m3 }
    sub_tensor={ base="..." ... dims={ ... } ... name="..." ... type=... }
    fully_connected={ name="..." output={"..." } input={"a" "b" ... } ... alpha=36DB0000 ... layers="[ONNX Layer: x]" }
    comm_allreduce={ ... layers="[ONNX Layer: y]" }    comm_allgather={ ... layers="[ONNX Layer: z]" }

``layers`` names the ONNX nodes that a matrix product stands for: that is how a plan is compared with its model.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ....errors import HerdError

VERSION = "1.7.1.116"
"""The version of TensorRT-RTX whose plans are understood."""
CAPABILITIES = ("75", "80", "86", "89", "120", "121")
"""Compute capabilities by their bit in the header."""
FP8 = "fp8_e4m3"

_MAGIC, _SERIAL, _HEADER = b"vtrt", 2, 40
_GRAPH, _END = b"header {\n  version =", b"\0"
_QUOTED = re.compile(r'"([^"]*)"')
_LAYER = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_COLLECTIVES = ("comm_allreduce", "comm_allgather")
_PROFILE = re.compile(r" \[profile (\d+)\]")


@dataclass(frozen=True)
class PlanTensor:
    """A tensor of a compiled graph.

    Attributes:
        name: the compiler's; weights are folded and renamed.
        dtype: such as ``fp8_e4m3``, ``bf16``, ``float``.
        dims: numbers, or the compiler's names of dimensions that are known when it runs.
        constant_bytes: size of its values in the plan, 0 for what is computed.
    """

    name: str
    dtype: str
    dims: tuple[str, ...]
    constant_bytes: int


@dataclass(frozen=True)
class Gemm:
    """A matrix product of a compiled graph.

    Attributes:
        name: the compiler's.
        layers: names of the ONNX nodes that it computes.
        a: left operand.
        b: right operand.
        output: result.
        alpha: what the sums are multiplied by inside of the product: for FP8 operands the product of their scales.
        profile: index of the optimisation profile that it belongs to.
    """

    name: str
    layers: tuple[str, ...]
    a: PlanTensor
    b: PlanTensor
    output: PlanTensor
    alpha: float
    profile: int

    @property
    def is_fp8(self) -> bool:
        """Whether both operands are FP8."""
        return self.a.dtype == self.b.dtype == FP8


@dataclass(frozen=True)
class PlanGraph:
    """One compiled graph.

    Attributes:
        profile: index of the optimisation profile that it belongs to.
        targets: compute capabilities that it was compiled for, such as ``89``; empty for what a fusion replaced.
        inputs: names of what it reads, with those of intermediate values where a network is several graphs.
        outputs: names of what it writes.
        tensors: by name.
        gemms: matrix products.
        collectives: names of the ONNX nodes in which ranks meet.
    """

    profile: int
    targets: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    tensors: dict[str, PlanTensor] = field(repr=False)
    gemms: tuple[Gemm, ...]
    collectives: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What is known of a plan.

    Attributes:
        path: the file.
        bytes: its size.
        targets: compute capabilities that it runs on.
        graphs: what was compiled.
    """

    path: Path
    bytes: int
    targets: tuple[str, ...]
    graphs: tuple[PlanGraph, ...]

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Read a plan file.

        Raises:
            HerdError: no such file, not a plan, one that was cut, or another version's.
        """
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                targets = _header(path, data)
                graphs = tuple(_graph(text) for text in _texts(data))
        except ValueError as error:  # mmap of an empty file
            raise HerdError(f"{path} is empty, not a TensorRT-RTX plan: build it again") from error
        except OSError as error:
            raise HerdError(f"{path} cannot be read: {error.strerror}") from error
        if not graphs:
            raise HerdError(f"{path} holds no compiled graph that this herdgraph can read: build it again with "
                            f"tensorrt_rtx {VERSION}")
        return cls(path, path.stat().st_size, targets, graphs)

    @property
    def gemms(self) -> tuple[Gemm, ...]:
        """All matrix products."""
        return tuple(gemm for graph in self.graphs for gemm in graph.gemms)

    def meeting(self, profile: int) -> tuple[str, ...]:
        """Names of the ONNX nodes in which ranks meet, in one profile."""
        return tuple(name for graph in self.graphs if graph.profile == profile for name in graph.collectives)

    @property
    def inputs(self) -> dict[str, PlanTensor]:
        """What the graphs read, under the network's names where it is an input of the network."""
        return self._named([name for graph in self.graphs for name in graph.inputs])

    @property
    def outputs(self) -> dict[str, PlanTensor]:
        """What the graphs write."""
        return self._named([name for graph in self.graphs for name in graph.outputs])

    @property
    def profiles(self) -> frozenset[int]:
        """Indices of the optimisation profiles."""
        return frozenset(graph.profile for graph in self.graphs)

    def constant_bytes(self) -> Counter[str]:
        """Bytes of constants by type; profiles share them, so those of one profile are counted."""
        found: Counter[str] = Counter()
        for graph in self.graphs:
            if graph.profile == min(self.profiles):
                for tensor in graph.tensors.values():
                    found[tensor.dtype] += tensor.constant_bytes
        return +found

    def _named(self, names: list[str]) -> dict[str, PlanTensor]:
        tensors = {name: tensor for graph in self.graphs for name, tensor in graph.tensors.items()}
        return {_PROFILE.sub("", name).removesuffix(".1"): tensors[name] for name in names if name in tensors}


def _header(path: Path, data: mmap.mmap) -> tuple[str, ...]:
    """Check the header; returns the compute capabilities."""
    if len(data) < _HEADER or data[:4] != _MAGIC:
        raise HerdError(f"{path} is not a TensorRT-RTX plan: it begins with {bytes(data[:4])!r}, not {_MAGIC!r}")
    serial, size = struct.unpack_from("<QQ", data, 8)
    version = ".".join(map(str, data[24:28]))
    if (serial, version) != (_SERIAL, VERSION):
        raise HerdError(f"{path} is a plan of TensorRT-RTX {version} (serialisation {serial}), this herdgraph reads "
                        f"{VERSION} (serialisation {_SERIAL}): build it again")
    if size != len(data):
        raise HerdError(f"{path} has {len(data)} bytes, its header says {size}: copy or build it again")
    (mask,) = struct.unpack_from("<Q", data, 32)
    return tuple(sm for bit, sm in enumerate(CAPABILITIES) if mask >> bit & 1)


def _texts(data: mmap.mmap) -> Iterator[str]:
    start = data.find(_GRAPH)
    while start >= 0:
        end = data.find(_END, start)
        yield data[start : end if end >= 0 else len(data)].decode("latin-1")
        start = data.find(_GRAPH, end) if end >= 0 else -1


def _graph(text: str) -> PlanGraph:
    lists: dict[str, tuple[str, ...]] = {"accelerators": (), "inputs": (), "outputs": ()}
    tensors: dict[str, PlanTensor] = {}
    products: list[str] = []
    collectives: list[str] = []
    for line in map(str.strip, text.splitlines()):
        kind, _, rest = line.partition("=")
        if kind in ("tensor", "sub_tensor"):
            tensor = _tensor(rest)
            tensors[tensor.name] = tensor
        elif kind == "fully_connected":
            products.append(rest)
        elif kind in _COLLECTIVES:
            collectives += _LAYER.findall(rest)
        elif kind in lists and not lists[kind]:
            lists[kind] = tuple(_QUOTED.findall(rest)) or tuple(re.findall(r"\bsm(\d+)", rest))
    named = _PROFILE.search(" ".join((*lists["inputs"], *lists["outputs"])))
    profile = int(named[1]) if named else 0
    gemms = tuple(_gemm(line, tensors, profile) for line in products)
    return PlanGraph(
        profile, lists["accelerators"], lists["inputs"], lists["outputs"], tensors, gemms, tuple(collectives)
    )


def _tensor(line: str) -> PlanTensor:
    dims = re.search(r"\bdims=\{([^}]*)\}", line)
    found = {key: re.search(rf'\b{key}=(?:"([^"]*)"|(\S+))', line) for key in ("name", "type", "const_payload_size")}
    name, dtype, constant = ((match[1] or match[2] or "") if match else "" for match in found.values())
    return PlanTensor(name, dtype, tuple(dims[1].replace('"', "").split()) if dims else (), int(constant or 0))


def _gemm(line: str, tensors: dict[str, PlanTensor], profile: int) -> Gemm:
    def values(key: str) -> list[str]:
        match = re.search(rf"\b{key}=\{{([^}}]*)\}}", line)
        return _QUOTED.findall(match[1]) if match else []

    def tensor(names: list[str], index: int) -> PlanTensor:
        name = names[index] if index < len(names) else ""
        return tensors.get(name, PlanTensor(name, "unknown", (), 0))

    name, alpha, layers = (
        re.search(rf"\b{key}", line) for key in ('name="([^"]*)"', r"alpha=(\w{8})\b", 'layers="(.*)"')
    )
    (scale,) = struct.unpack(">f", bytes.fromhex(alpha[1] if alpha else "7fc00000"))
    operands = values("input")
    return Gemm(
        name[1] if name else "", tuple(_LAYER.findall(layers[1])) if layers else (), tensor(operands, 0),
        tensor(operands, 1), tensor(values("output"), 0), scale, profile,
    )
