"""More hands: the same emoji as Microsoft, Mozilla, EmojiOne and an older Google drew them.

The npm packages ``@iconify-json/SET`` hold drawings as SVG, named in words. Names are the only thing by which a
drawing finds its emoji, so they are compared without signs and blanks: those that Unicode gave (``noto`` lists them by
code point), and those of ``emoji.json``. Sets whose licence asks to share alike are not here.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from herdgraph.files import atomic_directory

from .emoji import SIDE, Emoji
from .extras import needed
from .npm import fetch_package

VERSIONS = {"fluent-emoji-flat": "1.2.6", "fluent-emoji": "1.2.7", "noto-v1": "1.2.5", "emojione": "1.2.3",
            "fxemoji": "1.2.2", "noto": "1.2.9"}
NAMES = "noto"
"""The set of which names by code point are taken, and no drawings: they are those that Google's package has."""
LICENCES = {
    "fluent-emoji-flat": "Fluent Emoji (flat), Copyright Microsoft, MIT, https://github.com/microsoft/fluentui-emoji",
    "fluent-emoji": "Fluent Emoji (colour), Copyright Microsoft, MIT, https://github.com/microsoft/fluentui-emoji",
    "noto-v1": "Noto Emoji of 2016, Copyright Google, Apache License 2.0, https://github.com/googlefonts/noto-emoji",
    "emojione": "EmojiOne 2, Copyright Emoji One, CC BY 4.0, https://github.com/EmojiTwo/emojitwo",
    "fxemoji": "FxEmojis, Copyright Mozilla, Apache License 2.0, https://github.com/mozilla/fxemoji",
}


def fetch_set(name: str, cache: Path) -> Path:
    """The package of a set of drawings in a cache directory, fetched when it is not there.

    Raises:
        HerdError: there is no npm, no network or no such package.
    """
    target = cache / f"iconify-{name}-{VERSIONS[name]}"
    return fetch_package(f"@iconify-json/{name}@{VERSIONS[name]}", target, ("icons.json", "chars.json", "info.json"),
                         "icons.json")


def drawn_by(name: str, emoji: Sequence[Emoji], cache: Path) -> list[Emoji]:
    """The emoji that a set has, with its drawings, rendered into the cache.

    Args:
        name: of the set, one of ``LICENCES``.
        emoji: what is looked for.
        cache: directory that holds packages and pictures.

    Raises:
        HerdError: a package cannot be fetched, or the renderer is not installed.
    """
    target = cache / f"drawn-{name}-{VERSIONS[name]}"
    if not (target / "complete").is_file():
        icons = _read(fetch_set(name, cache) / "icons.json")
        spoken = _names_by_code(_read(fetch_set(NAMES, cache) / "chars.json"))
        with atomic_directory(target, mark="complete") as temporary:
            for code, icon in matched(emoji, icons, spoken).items():
                rendered(icon, icons).save(temporary / f"{code}.png")
            (temporary / "complete").touch()
    return [replace(one, picture=path) for one in emoji if (path := target / f"{one.code}.png").is_file()]


def matched(
    emoji: Sequence[Emoji], icons: Mapping[str, Any], spoken: Mapping[str, str]
) -> dict[str, Mapping[str, Any]]:
    """The icon of every emoji that has one, by code.

    Args:
        emoji: what is looked for.
        icons: ``icons.json`` of a set: drawings and other names of them.
        spoken: names by code points.
    """
    drawings, aliases = icons["icons"], icons.get("aliases", {})
    known = {_letters(alias): str(about["parent"]) for alias, about in aliases.items()}
    known |= {_letters(name): name for name in drawings}
    found = {}
    for one in emoji:
        names = (spoken.get(_plain(one.code), ""), one.unicode_name, one.name, *one.aliases)
        name = next((known[key] for key in map(_letters, names) if key in known), None)
        if name in drawings:
            found[one.code] = drawings[name]
    return found


def rendered(icon: Mapping[str, Any], icons: Mapping[str, Any]) -> Image.Image:
    """An icon in the size of all pictures, with its transparency.

    Raises:
        HerdError: the renderer is not installed.
    """
    resvg = needed("resvg_py")
    left, top, width, height = (icon.get(key, icons.get(key, default)) for key, default in (
        ("left", 0), ("top", 0), ("width", 16), ("height", 16)))
    svg = ('<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
           f'width="{width}" height="{height}" viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>')
    png = bytes(resvg.svg_to_bytes(svg_string=svg, width=2 * SIDE, height=2 * SIDE))
    return Image.open(io.BytesIO(png)).convert("RGBA").resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _names_by_code(characters: Mapping[str, str]) -> dict[str, str]:
    return {_plain(code): name for code, name in characters.items()}


def _plain(code: str) -> str:
    """Code points without joiners, variation selectors and leading zeros, in which packages differ."""
    return "-".join(part.lstrip("0") for part in code.lower().split("-") if part not in ("fe0f", "200d"))


def _letters(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())
