"""What makes two tokenizers the same: ids of a teacher mean nothing to a student with another vocabulary."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from ....errors import HerdError
from ....files import sha256_of
from ....reading import read_json

_PASSING = ("padding", "truncation")
"""Parts of ``tokenizer.json`` that say how it was last used, not what ids mean."""


def tokenizer_hash(directory: Path) -> str:
    """SHA-256 of a checkpoint's or bundle's tokenizer; layout and last use of the file do not change it.

    Raises:
        HerdError: neither ``tokenizer.json`` nor ``tokenizer.model`` is there, or the former cannot be read.
    """
    if (path := directory / "tokenizer.json").is_file():
        content = {name: value for name, value in read_json(path).items() if name not in _PASSING}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    if (path := directory / "tokenizer.model").is_file():
        return sha256_of(path)
    raise HerdError(f"{directory} has no tokenizer.json or tokenizer.model: a teacher and its student must be known to "
                    "use the same")


def require_tokenizer(teacher: str, student: str, what: str = "the teacher") -> None:
    """Refuse cross-tokenizer use.

    Args:
        teacher: hash of the tokenizer that the targets are made with.
        student: hash of the student's.
        what: the teacher's name, for the message.

    Raises:
        HerdError: they differ.
    """
    if teacher != student:
        raise HerdError(f"{what} uses tokenizer {teacher[:12]}, the student {student[:12]}: its ids mean other text; "
                        "distil between models with the same tokenizer")
