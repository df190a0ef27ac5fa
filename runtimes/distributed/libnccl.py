"""The thirteen functions of NCCL that ranks need, through ctypes. Not run on hardware.

``libnccl.so.2`` is found by ``cuda.pathfinder`` where that is installed (it knows the wheel ``nvidia-nccl-cu13``, conda
and the CUDA toolkit), otherwise by the system's loader. Its symbols become global: TensorRT opens the same library by
name, and is to find this one.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_char, c_int, c_size_t, c_void_p
from typing import Any

from ...errors import HerdError

NAME = "libnccl.so.2"
OLDEST = 21300
"""2.13, the first that says in words what went wrong (``ncclGetLastError``)."""
UNIQUE_ID_BYTES = 128
TYPES = {"int8": 0, "uint8": 1, "int32": 2, "int64": 4, "float16": 6, "float32": 7, "bfloat16": 9}
"""NCCL's numbers of types of elements."""

_SUM = 0
_SUCCESS, _IN_PROGRESS = 0, 7


class _UniqueId(ctypes.Structure):
    """What ranks of one communicator know each other by; passed by value."""

    _fields_ = (("internal", c_char * UNIQUE_ID_BYTES),)


_EXCHANGE = (c_size_t, c_int, c_int, c_void_p, c_void_p)
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "ncclGetVersion": (POINTER(c_int),),
    "ncclGetUniqueId": (POINTER(_UniqueId),),
    "ncclCommInitRank": (POINTER(c_void_p), c_int, _UniqueId, c_int),
    "ncclCommAbort": (c_void_p,),
    "ncclCommGetAsyncError": (c_void_p, POINTER(c_int)),
    "ncclAllReduce": (c_void_p, c_void_p, *_EXCHANGE),
    "ncclAllGather": (c_void_p, c_void_p, c_size_t, c_int, c_void_p, c_void_p),
    "ncclSend": (c_void_p, *_EXCHANGE),
    "ncclRecv": (c_void_p, *_EXCHANGE),
    "ncclGroupStart": (),
    "ncclGroupEnd": (),
}
"""Types of the arguments; all return a status."""


class NcclError(HerdError):
    """A function of NCCL failed; the message has its name and NCCL's words."""


class Library:
    """A loaded NCCL; ``load`` makes it.

    Args:
        loaded: by ctypes.

    Attributes:
        version: such as 22703 for 2.27.3.
    """

    def __init__(self, loaded: Any) -> None:
        self._loaded = loaded
        for name, arguments in _FUNCTIONS.items():
            function = getattr(loaded, name)
            function.argtypes, function.restype = arguments, c_int
        loaded.ncclGetErrorString.argtypes, loaded.ncclGetErrorString.restype = (c_int,), ctypes.c_char_p
        loaded.ncclGetLastError.argtypes, loaded.ncclGetLastError.restype = (c_void_p,), ctypes.c_char_p
        found = c_int()
        self.call("ncclGetVersion", byref(found))
        self.version = found.value

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function.

        Raises:
            NcclError: with what NCCL says of it.
        """
        status = getattr(self._loaded, name)(*arguments)
        if status not in (_SUCCESS, _IN_PROGRESS):
            raise NcclError(f"{name} failed: {self.words(status)}")

    def words(self, status: int) -> str:
        """What NCCL says of a status, in one line."""
        texts = (self._loaded.ncclGetErrorString(status), self._loaded.ncclGetLastError(None))
        return "; ".join(" ".join(text.decode(errors="replace").split()) for text in texts if text)

    def unique_id(self) -> bytes:
        """What the ranks of a new communicator are given; this process keeps the door open for them."""
        made = _UniqueId()
        self.call("ncclGetUniqueId", byref(made))
        return bytes(made)

    def communicator(self, unique_id: bytes, size: int, rank: int) -> Communicator:
        """Meet ``size`` ranks on the thread's GPU; waits until all have come."""
        pointer = c_void_p()
        self.call("ncclCommInitRank", byref(pointer), size, _UniqueId.from_buffer_copy(unique_id), rank)
        return Communicator(self, pointer)


class Communicator:
    """Ranks that have met. Exchanges are put on a stream; counts are of elements.

    Args:
        library: that it belongs to.
        pointer: NCCL's.
    """

    def __init__(self, library: Library, pointer: c_void_p) -> None:
        self._library, self._pointer = library, pointer

    def all_reduce(self, value: int, result: int, count: int, dtype: str, stream: int) -> None:
        """Sum over all ranks."""
        self._library.call("ncclAllReduce", value, result, count, TYPES[dtype], _SUM, self._pointer, stream)

    def all_gather_rows(self, value: int, result: int, rows: int, row_bytes: int, width: int, stream: int) -> None:
        """Rows of all ranks side by side, as one launch: row r of ``result`` is row r of every rank, in order."""
        self._library.call("ncclGroupStart")
        for row in range(rows):
            self._library.call("ncclAllGather", value + row * row_bytes, result + row * width * row_bytes, row_bytes,
                               TYPES["uint8"], self._pointer, stream)
        self._library.call("ncclGroupEnd")

    def send(self, value: int, count: int, dtype: str, peer: int, stream: int) -> None:
        """To a rank of the communicator."""
        self._library.call("ncclSend", value, count, TYPES[dtype], peer, self._pointer, stream)

    def receive(self, result: int, count: int, dtype: str, peer: int, stream: int) -> None:
        """From a rank of the communicator."""
        self._library.call("ncclRecv", result, count, TYPES[dtype], peer, self._pointer, stream)

    def error(self) -> str:
        """What went wrong since it was made, empty when nothing did; does not wait."""
        if not self._pointer:
            return ""
        status = c_int()
        self._library.call("ncclCommGetAsyncError", self._pointer, byref(status))
        return "" if status.value in (_SUCCESS, _IN_PROGRESS) else self._library.words(status.value)

    def abort(self) -> None:
        """End what runs, and free it; from any thread, and without the other ranks."""
        pointer, self._pointer = self._pointer, c_void_p()
        if pointer:
            self._library.call("ncclCommAbort", pointer)

    def capsule(self) -> Any:
        """As a ``PyCapsule``, which TensorRT takes; the communicator has to live longer than what was given it."""
        make = ctypes.pythonapi.PyCapsule_New
        make.argtypes, make.restype = (c_void_p, ctypes.c_char_p, c_void_p), ctypes.py_object
        return make(self._pointer, None, None)


def load() -> Library:
    """Find and open NCCL.

    Raises:
        HerdError: it is not there, or too old.
    """
    try:
        loaded = ctypes.CDLL(_path(), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise HerdError(f"ranks on GPUs exchange through NCCL, and {NAME} is not found: pip install nvidia-nccl-cu13, "
                        "or put its folder into LD_LIBRARY_PATH") from error
    try:
        library = Library(loaded)
    except AttributeError as error:
        raise HerdError(f"{_path()} is not the NCCL that is needed: {error}") from error
    if library.version < OLDEST:
        raise HerdError(f"NCCL {told(library.version)} is too old, at least {told(OLDEST)} is needed: pip install -U "
                        "nvidia-nccl-cu13")
    return library


def told(version: int) -> str:
    """A version for people: 22703 is 2.27.3."""
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def _path() -> str:
    """Where the library is: as ``cuda.pathfinder`` says, otherwise its name, which the system's loader looks up."""
    try:
        from cuda.pathfinder import DynamicLibNotFoundError, load_nvidia_dynamic_lib
    except ImportError:
        return NAME
    try:
        return str(load_nvidia_dynamic_lib("nccl").abs_path)
    except DynamicLibNotFoundError:
        return NAME
