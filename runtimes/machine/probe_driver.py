"""Asks the NVIDIA driver for its version and its GPUs and prints a JSON document. Run by ``probe.py``."""

from __future__ import annotations

import ctypes
import json
import re
import sys
from pathlib import Path
from typing import Any

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_SM_MAJOR, _SM_MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR."""
_RELEASE = Path("/proc/driver/nvidia/version")


class DriverError(Exception):
    """The driver objects to a call."""


class Driver:
    """The functions of the driver's library that are needed, each checked."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(LIBRARY)

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function; raises in the driver's own words."""
        status = getattr(self._library, name)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(status, ctypes.byref(text))
            raise DriverError(f"{name} failed: {(text.value or b'unknown error').decode(errors='replace')} ({status})")

    def number(self, name: str, *arguments: Any) -> int:
        """The whole number that a function writes to its first argument."""
        found = ctypes.c_int()
        self.call(name, ctypes.byref(found), *arguments)
        return found.value

    def gpu(self, index: int) -> dict[str, Any]:
        """Name, compute capability and bytes of memory of a GPU."""
        device, memory, name = self.number("cuDeviceGet", index), ctypes.c_size_t(), ctypes.create_string_buffer(256)
        self.call("cuDeviceGetName", name, len(name), device)
        self.call("cuDeviceTotalMem_v2", ctypes.byref(memory), device)
        sm = "".join(str(self.number("cuDeviceGetAttribute", part, device)) for part in (_SM_MAJOR, _SM_MINOR))
        return {"index": index, "name": name.value.decode(errors="replace"), "sm": sm, "memory": memory.value}


def ask() -> dict[str, Any]:
    """What the driver says; ``problem`` is why it stopped answering."""
    found: dict[str, Any] = {"cuda": None, "release": _release(), "gpus": [], "problem": None}
    try:
        driver = Driver()
        version = driver.number("cuDriverGetVersion")
        found["cuda"] = [version // 1000, version % 1000 // 10]
        driver.call("cuInit", 0)
        found["gpus"] = [driver.gpu(index) for index in range(driver.number("cuDeviceGetCount"))]
    except (OSError, AttributeError, DriverError) as error:
        found["problem"] = str(error)
    return found


def _release() -> str | None:
    """The release of the kernel's module, such as 580.159.04."""
    try:
        match = re.search(r"\b\d{3}\.\d+(?:\.\d+)?\b", _RELEASE.read_text(encoding="utf-8"))
    except OSError:
        return None
    return match[0] if match else None


if __name__ == "__main__":
    print(json.dumps(ask()))
