"""The digests that blocks of weights are compared by.

Both have 256 bits, and nobody knows how to find two contents with one digest: neither a fault of a disk nor somebody
who exchanges weights passes the check. The digests themselves are as trustworthy as the manifest that vouches for them.
BLAKE3 takes half the time of SHA-256, on a processor with instructions for SHA-256 too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any, Literal

from blake3 import blake3

Algorithm = Literal["blake3", "sha256"]
NEWEST: Algorithm = "blake3"
"""What new bundles are written with; format 2 has SHA-256."""

_HASHERS: dict[Algorithm, Callable[[], Any]] = {"blake3": blake3, "sha256": hashlib.sha256}


def digest(algorithm: Algorithm, pieces: Iterable[bytes | memoryview]) -> str:
    """The digest of some bytes that come in pieces, in hexadecimal; large pieces release the interpreter lock."""
    hasher = _HASHERS[algorithm]()
    for piece in pieces:
        hasher.update(piece)
    return str(hasher.hexdigest())
