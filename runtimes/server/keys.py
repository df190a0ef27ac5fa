"""API keys: a file with one a line, read again when it changes; what is kept of them are their hashes.

    # lines like this one are left out
    sk-4f1c...                                             a key; what follows a space is its name in the log
    sk-93ab... alice
    sha256:5e884898da28047151d0e56f8dc62927736...  # bob   its SHA-256 in hexadecimal

A key named ``metrics`` opens ``/metrics`` and nothing else; where there is none, ``/metrics`` is open.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
from dataclasses import dataclass
from hmac import compare_digest
from pathlib import Path

from starlette.datastructures import Headers

from ...errors import HerdError
from ...reading import read_text
from .errors import ApiError

log = logging.getLogger(__name__)

METRICS = "metrics"
_SECONDS_BETWEEN_LOOKS = 1.0
_HASHED = re.compile(r"sha256:([0-9a-fA-F]{64})")


@dataclass(eq=False)
class Key:
    """One of those who may ask.

    Attributes:
        name: for the log; the beginning of its hash where it was given none.
        digest: SHA-256 of the key.
        running: requests at the moment.
    """

    name: str
    digest: bytes
    running: int = 0


class Keys:
    """The keys of a file.

    Args:
        path: the file; it is looked at again at most once a second.

    Raises:
        HerdError: on construction: it cannot be read, has no key, or a line that is none.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._looked = path, time.monotonic()
        self._state = _state(path)
        self._keys = read_keys(path)

    def find(self, headers: Headers) -> Key:
        """The key of a request: ``Authorization: Bearer KEY``, or ``x-api-key: KEY`` as Anthropic's clients send it.

        Raises:
            ApiError: it has none, or another one.
        """
        self._refresh()
        scheme, _, given = headers.get("authorization", "").partition(" ")
        given = given.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        challenge = {"www-authenticate": "Bearer"}
        if not given:
            raise ApiError(401, "no API key was given: send it as 'Authorization: Bearer KEY'", headers=challenge)
        digest = hashlib.sha256(given.encode("utf-8", "replace")).digest()
        found = [key for key in self._keys if compare_digest(key.digest, digest)]
        if not found:
            raise ApiError(401, "this API key is not known here", headers=challenge)
        return found[0]

    @property
    def guard_metrics(self) -> bool:
        """Whether ``/metrics`` needs a key."""
        self._refresh()
        return any(key.name == METRICS for key in self._keys)

    def _refresh(self) -> None:
        """Read the file again if it changed; keep what was read before if it cannot be used now."""
        if time.monotonic() < self._looked + _SECONDS_BETWEEN_LOOKS:
            return
        self._looked = time.monotonic()
        if (state := _state(self._path)) == self._state:
            return
        self._state = state
        try:
            self._keys = _with_counts(read_keys(self._path), self._keys)
        except HerdError as error:
            log.warning("the API keys were not read again, those from before hold: %s", error)


def read_keys(path: Path) -> list[Key]:
    """The keys of a file.

    Raises:
        HerdError: it cannot be read, has no key, or a line that is none.
    """
    keys = [key for number, line in enumerate(read_text(path, most=1 << 20).splitlines(), 1)
            if (key := _of_line(line, f"{path}, line {number}"))]
    if not keys:
        raise HerdError(f"{path} has no API key: write one a line")
    return keys


def _of_line(line: str, where: str) -> Key | None:
    words = line.strip().split(maxsplit=1)
    if not words or words[0].startswith("#"):
        return None
    secret, name = words[0], words[1].strip("# \t") if len(words) > 1 else ""
    if secret.startswith("sha256:"):
        if not (match := _HASHED.fullmatch(secret)):
            raise HerdError(f"{where} has a hash that is not sha256: and 64 hexadecimal digits")
        digest = bytes.fromhex(match[1])
    else:
        digest = hashlib.sha256(secret.encode()).digest()
    return Key(name or digest.hex()[:8], digest)


def _with_counts(keys: list[Key], before: list[Key]) -> list[Key]:
    """Keys that stay are the same objects, since requests that run count on them."""
    known = {(key.digest, key.name): key for key in before}
    return [known.get((key.digest, key.name), key) for key in keys]


def _state(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size
