"""Real pictures with names that a package registry carries: emoji, as several vendors draw them.

The npm packages ``emoji-datasource-VENDOR`` (Cal Henderson, MIT) hold pictures of 64 x 64 pixels and, in
``emoji.json``, what they show. The drawings have licences of their own: Google's (Noto) Apache-2.0, Twitter's (Twemoji)
CC BY 4.0; Apple's and Facebook's are not free.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from herdgraph.errors import HerdError

from .npm import fetch_package

VERSION = "16.0.0"
LICENCES = {
    "google": "Noto Emoji, Copyright Google, Apache License 2.0, https://github.com/googlefonts/noto-emoji",
    "twitter": "Twemoji, Copyright Twitter and other contributors, CC BY 4.0, https://github.com/jdecked/twemoji",
}
SIDE = 64
"""Pixels along a picture."""

_MOST_WORDS = {"Smileys & Emotion": 9, "People & Body": 6, "Flags": 99}
"""Words of a name that is kept, 4 elsewhere. Names of faces say what is to be seen, others are like an index."""
_VOWEL = re.compile(r"[aeio]|u(?!ni)|hour", re.IGNORECASE)
_HEAD_ENDS = re.compile(r" (?:with|in|on|of|and|under|over|from|holding|facing|wearing) ")


@dataclass(frozen=True)
class Emoji:
    """One emoji as one vendor draws it.

    Attributes:
        code: its code points, the same for all vendors.
        name: in words, such as "red apple".
        unicode_name: as the standard calls it, such as "RED APPLE".
        aliases: its short names, in words.
        category: in words, such as "food and drink".
        kind: narrower, such as "food fruit".
        picture: PNG file.
    """

    code: str
    name: str
    unicode_name: str
    aliases: tuple[str, ...]
    category: str
    kind: str
    picture: Path

    @property
    def phrase(self) -> str:
        """The name with its article: "a red apple", "the flag of Japan", "scissors"."""
        if self.name.startswith("flag of "):
            return f"the {self.name}"
        head = _HEAD_ENDS.split(self.name)[0]
        if head.endswith("s") and not head.endswith(("ss", "us")):
            return self.name
        return f"{'an' if _VOWEL.match(self.name) else 'a'} {self.name}"

    def is_held_out(self, fraction: float) -> bool:
        """Whether its pictures are kept from training, by a hash of its code."""
        return chance(self.code) < fraction


def chance(key: str) -> float:
    """A number from 0 to 1 that is the same for a key at all times."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def fetch_emoji(vendor: str, cache: Path) -> Path:
    """The package of a vendor in a cache directory, fetched from the npm registry when it is not there.

    Args:
        vendor: ``google`` or ``twitter``.
        cache: directory that holds packages, some 15 MB each.

    Raises:
        HerdError: there is no npm, no network or no such package.
    """
    target = cache / f"emoji-{vendor}-{VERSION}"
    wanted = ("emoji.json", "LICENSE", "README.md", f"img/{vendor}/{SIDE}/")
    return fetch_package(f"emoji-datasource-{vendor}@{VERSION}", target, wanted, "emoji.json")


def read_emoji(package: Path, vendor: str) -> list[Emoji]:
    """The emoji of a package that can be told apart: no skin tones, lists of relatives or ideographs.

    Of emoji with the same picture, such as the flags of Norway and of Bouvet Island, the one with the shortest name is
    kept.

    Raises:
        HerdError: the package is incomplete.
    """
    found: dict[str, Emoji] = {}
    for row in sorted(_rows(package / "emoji.json"), key=_by_length_of_name):
        picture = package / "img" / vendor / str(SIDE) / str(row.get("image"))
        if not _is_usable(row) or not row.get(f"has_img_{vendor}", True) or not picture.is_file():
            continue
        emoji = _emoji(row, picture)
        found.setdefault(hashlib.sha256(picture.read_bytes()).hexdigest(), emoji)
    unique = {emoji.name: emoji for emoji in found.values()}
    if not unique:
        raise HerdError(f"{package} holds no pictures of {vendor}: remove it to fetch it again")
    return sorted(unique.values(), key=lambda emoji: emoji.code)


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HerdError(f"{path} cannot be read ({error}): remove its directory to fetch it again") from error
    if not isinstance(rows, list):
        raise HerdError(f"{path} holds no list: remove its directory to fetch it again")
    return [row for row in rows if isinstance(row, dict)]


def _by_length_of_name(row: Mapping[str, Any]) -> tuple[int, str]:
    return len(str(row.get("name"))), str(row.get("unified"))


def _is_usable(row: Mapping[str, Any]) -> bool:
    """Not a skin tone, a family spelled out ("FAMILY: MAN, BOY") or a squared ideograph ("u7121")."""
    name, short = str(row.get("name") or ""), str(row.get("short_name") or "")
    return bool(name and short) and row.get("category") != "Component" and "," not in name and "IDEOGRAPH" not in name


def _emoji(row: Mapping[str, Any], picture: Path) -> Emoji:
    aliases = tuple(_words(short) for short in row.get("short_names") or [row["short_name"]])
    category = str(row.get("category") or "Symbols")
    name = _name(str(row["name"]), aliases[0], category)
    others = tuple(alias for alias in aliases if alias != name and not alias.startswith("flag "))
    kind = _words(str(row.get("subcategory") or category))
    return Emoji(str(row["unified"]).lower(), name, str(row["name"]), others, _words(category).lower(), kind, picture)


def _name(name: str, short: str, category: str) -> str:
    if category == "Flags" and name.endswith(" Flag"):
        return f"flag of {_words(name.removesuffix(' Flag'))}"
    if ":" in name or len(name.split()) > _MOST_WORDS.get(category, 4):
        return short
    return _words(name.lower() if name.isupper() else name)


def _words(name: str) -> str:
    return " ".join(re.sub(r"[_-]", " ", name.replace("&", "and")).split())
