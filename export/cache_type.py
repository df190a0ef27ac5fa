"""The type of keys and values that a bundle's graph or plan takes, read from the ONNX file without ONNX.

An ONNX file is a protocol buffer: fields of a number and a wire type, messages within messages. The way to an input's
type is ``ModelProto.graph`` (7), ``GraphProto.input`` (11), ``ValueInfoProto.name`` (1) and ``.type`` (2),
``TypeProto.tensor_type`` (1), ``elem_type`` (1) and ``shape`` (2), ``dim`` (1), ``dim_value`` (1). Cache blocks are
bytes, and their number says what they hold. Torch-free: a bundle is inspected in the base install.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from ..errors import HerdError
from ..model.config import TextConfig
from ..model.quantization.formats import CACHE_BYTES
from ..runtimes.bundle.manifest import Bundle
from ..runtimes.kv_cache.pool import BLOCK_TOKENS, block_bytes, caches_of_block
from .plan_description import PLAN, describe_plan

_BYTES = 2
"""The element type of cache blocks."""
_NAMES = {1: "float32", 3: "int8", 10: "float16", 16: "bf16", 17: "fp8"}
"""Numbers of ``TensorProto.DataType``, by the names that the planner uses."""

_IN_BLOCKS = {"float32": "float", "float16": "float16", "int8": "int8"}
"""What cache blocks may hold, by the same names, and what ``kv_cache/pool.py`` calls it."""

_PLAN_NAMES = {"fp8_e4m3": "fp8", "float": "float32", "half": "float16"}
"""What plans call types, by the same names."""

_FIXED = {1: 8, 5: 4}
"""Bytes of a field by its wire type."""


def cache_type(bundle: Bundle) -> str | None:
    """How a bundle stores keys and values: ``float32``, ``float16``, ``int8``, ``bf16`` or ``fp8``, None if unknown."""
    manifest, text = bundle.manifest, bundle.manifest.config.text
    names = manifest.shards.graphs() if manifest.shards else [manifest.graphs["decoder"]]
    local = manifest.shards.plan.local_text(text, 0) if manifest.shards else text
    readers: dict[str, Callable[[Path], str | None]] = {
        ".onnx": partial(_type_in_graph, text=local), PLAN: _type_in_plan}
    paths = [bundle.directory / name for name in names]
    return next(filter(None, (readers[path.suffix](path) for path in paths if path.suffix in readers)), None)


def cache_row_bytes(caches: str, head_dim: int, *, in_blocks: bool) -> int:
    """Bytes of a token's keys in one head, and as many of its values.

    Args:
        caches: their type, one of ``CACHE_BYTES``.
        head_dim: width of a head.
        in_blocks: they lie in cache blocks, as those of target ``cpu`` do; a token has its share, scales included.
    """
    if in_blocks and caches in _IN_BLOCKS:
        return block_bytes(1, head_dim, _IN_BLOCKS[caches]) // BLOCK_TOKENS
    return head_dim * CACHE_BYTES[caches]


def _type_in_plan(path: Path) -> str | None:
    """Element type of the first key of a plan, None if it takes none or is another version's."""
    try:
        inputs = describe_plan(path).inputs
    except HerdError:
        return None
    kind = next((text for name, text in inputs.items() if name.startswith("past.")), "").partition("[")[0]
    return _PLAN_NAMES.get(kind, kind) or None


def _type_in_graph(path: Path, text: TextConfig) -> str | None:
    """Element type of the first key of a graph, None if it takes none."""
    try:
        for graph in _messages(path.read_bytes(), 7):
            for value in _messages(graph, 11):
                if bytes(next(_messages(value, 1), b"")).startswith(b"past."):
                    kind = next(_messages(next(_messages(value, 2)), 1))
                    element = next(number for field, number in _fields(kind) if field == 1)
                    return _type_of_block(kind, text) if element == _BYTES else _NAMES.get(element)  # type: ignore[arg-type]
    except (IndexError, StopIteration, ValueError):  # no protocol buffer
        return None
    return None


def _type_of_block(kind: memoryview, text: TextConfig) -> str | None:
    """The type of keys in blocks [blocks, bytes]."""
    *_, last = _messages(next(_messages(kind, 2)), 1)
    count = next(number for field, number in _fields(last) if field == 1)
    assert isinstance(count, int)
    caches = caches_of_block(count, text.num_kv_heads, text.head_dim)
    return next((name for name, kind in _IN_BLOCKS.items() if kind == caches), None)


def _messages(data: bytes | memoryview, wanted: int) -> Iterator[memoryview]:
    """Contents of the fields of a number that hold bytes, a text or a message."""
    return (content for field, content in _fields(data) if field == wanted and isinstance(content, memoryview))


def _fields(data: bytes | memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and content of every field of a message."""
    view, at = memoryview(data), 0
    while at < len(view):
        key, at = _varint(view, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            content, at = _varint(view, at)
            yield number, content
        elif wire in _FIXED:
            at += _FIXED[wire]
        elif wire == 2:
            count, at = _varint(view, at)
            yield number, view[at : at + count]
            at += count
        else:
            raise ValueError(f"{wire} is no wire type")


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    """A number in groups of seven bits, the lowest first, and where it ends."""
    number = shift = 0
    while True:
        byte = view[at]
        number, shift, at = number | (byte & 0x7F) << shift, shift + 7, at + 1
        if byte < 0x80:
            return number, at
