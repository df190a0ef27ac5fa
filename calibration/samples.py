"""Calibration data: what is read where.

=======================  ====================================================================================
given                    read as
=======================  ====================================================================================
``*.txt``, ``*.md``      plain text
``*.jsonl``              one sample per line: ``{"text": ...}``, ``{"messages": [...]}`` or ``{"images": [...]}``,
                         with ``images`` (paths relative to the file) for the ``<|image|>`` of a text or the
                         ``{"type": "image"}`` of messages; what ``herdgraph train`` reads as well:
                         ``{"content": ["A", {"image": "cow.png"}, ...]}`` and such parts in messages
directory of pictures    one sample per picture
directory of a           rows of a Hugging Face dataset saved by ``save_to_disk``, with the same fields
``datasets`` dataset
nothing                  pages of the Jargon File and, for models that see, drawn pictures; not your data
=======================  ====================================================================================
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..errors import HerdError

DEFAULT_TEXT = Path(__file__).parent / "data" / "jargon.txt"
PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"})
_TEXTS = frozenset({".txt", ".md", ""})
IMAGE = "<|image|>"
PAGE = 512
"""Characters of a long text that are one sample, at least."""


@dataclass(frozen=True)
class Sample:
    """One piece of data.

    Attributes:
        prompt: a text, or chat messages.
        images: pictures for the placeholders of a text.
        origin: where it came from, for messages.
    """

    prompt: str | list[dict[str, Any]]
    images: tuple[Any, ...] = ()
    origin: str = "the default"

    @property
    def plain(self) -> bool:
        """Only text, which may be joined with other text and cut anywhere."""
        return isinstance(self.prompt, str) and not self.images


def read_samples(paths: Iterable[Path], *, images: bool) -> Iterator[Sample]:
    """Samples of files and directories, one of each in turn; the default when none is given.

    Args:
        paths: as in the table above.
        images: whether the model sees; the default has pictures then.

    Raises:
        HerdError: nothing there, a file of an unknown kind, or a line that is no sample.
    """
    sources = [_read(path) for path in paths]
    if not sources:
        sources = [_pages(DEFAULT_TEXT), *([drawn()] if images else [])]
    while sources:  # in turn, so that a long text leaves room for what was given beside it
        for source in list(sources):
            if (sample := next(source, None)) is None:
                sources.remove(source)
            else:
                yield sample


def _read(path: Path) -> Iterator[Sample]:
    suffix = path.suffix.lower()
    if not path.exists():
        raise HerdError(f"{path} does not exist: give a text, a .jsonl file or a directory")
    if path.is_dir():
        saved = any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))
        yield from _dataset(path) if saved else _pictures(path)
    elif not path.is_file():  # a pipe or a device may never end
        raise HerdError(f"{path} is not a regular file: give a text, a .jsonl file or a directory")
    elif suffix == ".jsonl":
        yield from _lines(path)
    elif suffix in PICTURES:
        yield Sample(IMAGE, (path,), str(path))
    elif suffix in _TEXTS:
        yield from _pages(path)
    else:
        raise HerdError(f"{path} is a {path.suffix} file: .txt, .jsonl, pictures and directories are read")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise HerdError(f"{path} cannot be read as text: {getattr(error, 'strerror', None) or error}") from error


def _pages(path: Path) -> Iterator[Sample]:
    """The text of a file in pieces that end with a word."""
    for page in re.finditer(rf"(?s).{{{PAGE}}}\S*\s*|.+", _text(path)):
        yield Sample(page[0], (), str(path))


def _pictures(directory: Path) -> Iterator[Sample]:
    found = [path for path in sorted(directory.iterdir()) if path.suffix.lower() in PICTURES]
    if not found:
        raise HerdError(f"{directory} holds neither pictures nor a saved dataset: give another directory")
    for path in found:
        yield Sample(IMAGE, (path,), str(path))


def _lines(path: Path) -> Iterator[Sample]:
    for number, line in enumerate(_text(path).split("\n"), 1):  # a text in JSON may hold other ends of lines
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise HerdError(f"{path} line {number} is not JSON: {error}") from error
        yield sample_of(row, f"{path} line {number}", path.parent)


def _dataset(directory: Path) -> Iterator[Sample]:
    try:
        datasets = import_module("datasets")
    except ImportError as error:
        raise HerdError(f"{directory} is a saved dataset: pip install datasets to read it") from error
    try:
        found = datasets.load_from_disk(str(directory))
    except (OSError, ValueError, KeyError) as error:
        raise HerdError(f"{directory} cannot be read as a dataset: {error}") from error
    for split in found.values() if isinstance(found, datasets.DatasetDict) else [found]:
        for number, row in enumerate(split):
            yield sample_of(row, f"{directory} row {number}", directory)


def sample_of(row: Any, origin: str, base: Path) -> Sample:
    """A sample from one row of data.

    Args:
        row: a mapping with ``text``, ``messages`` or ``content``, and ``images`` or ``image``.
        origin: for messages.
        base: what relative paths of pictures are relative to.

    Raises:
        HerdError: none of them, or of another kind.
    """
    if not isinstance(row, Mapping):
        raise HerdError(f"{origin} is not an object: give text, messages or images")
    messages, text = row.get("messages"), row.get("text")
    listed = row.get("images") or ([row["image"]] if row.get("image") is not None else [])
    for name, value, kind in (("images", listed, list), ("messages", messages or [], list), ("text", text or "", str)):
        if not isinstance(value, kind):
            raise HerdError(f"{origin}: {name} is of type {type(value).__name__}, {kind.__name__} is needed")
    images = [_picture(image, base, origin) for image in listed]
    if isinstance(content := row.get("content"), list):
        return _document(content, images, base, origin)
    if messages:
        return Sample(_conversation(messages, images, base, origin), (), origin)
    if not text and not images:
        raise HerdError(f"{origin} has neither text, messages nor images")
    missing = len(images) - (text or "").count(IMAGE)
    return Sample(IMAGE * max(0, missing) + (text or ""), tuple(images), origin)


def _document(parts: list[Any], images: list[Any], base: Path, origin: str) -> Sample:
    """A text with a placeholder for every picture among its parts."""
    [message] = _conversation([{"content": parts}], images, base, origin)
    content = message["content"]
    if not all(isinstance(part, Mapping) and part.get("type") in ("image", "text") for part in content):
        raise HerdError(f"{origin}: a part of content is neither a text nor an image")
    text = "".join(IMAGE if part["type"] == "image" else part["text"] for part in content)
    return Sample(text, tuple(part["image"] for part in content if part["type"] == "image"), origin)


def _typed(part: Any) -> Any:
    """A part in the form of chat templates, which name its type."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = next((kind for kind in ("image", "text") if kind in part), "") if isinstance(part, Mapping) else ""
    return {"type": kind, **part} if kind else part


def _conversation(messages: list[Any], images: list[Any], base: Path, origin: str) -> list[Any]:
    """Messages with a picture in every part of type image: its own, or the next of those that stand beside them."""
    waiting = iter(images)

    def filled(part: Any) -> Any:
        part = _typed(part)
        if not isinstance(part, Mapping) or part.get("type") != "image":
            return part
        own = next((part[name] for name in ("path", "image", "data") if part.get(name) is not None), None)
        image = next(waiting, None) if own is None else _picture(own, base, origin)
        return {"type": "image", "image": image}

    def complete(message: Any) -> Any:
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), list):
            return message  # the template says what is wrong with it
        return {**message, "content": [filled(part) for part in message["content"]]}

    found = [complete(message) for message in messages]
    if left := len(list(waiting)):
        raise HerdError(f"{origin} has {len(images)} images for {len(images) - left} empty parts of type image: they "
                        "must match")
    return found


def _picture(image: Any, base: Path, origin: str) -> Any:
    """What the image processor reads: a path, bytes or a Pillow image; some datasets wrap bytes or a path."""
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str):
        return base / image
    if not isinstance(image, bytes | Path | Image.Image):
        raise HerdError(f"{origin}: a picture is of type {type(image).__name__}, a path is needed")
    return image


def drawn(count: int = 8, seed: int = 0) -> Iterator[Sample]:
    """Pictures made of gradients, shapes and noise, in several proportions."""
    random = np.random.default_rng(seed)
    for number in range(count):
        width, height = (int(side) for side in random.integers(200, 700, 2))
        x, y = np.linspace(0, 1, width)[None, :, None], np.linspace(0, 1, height)[:, None, None]
        colours = random.uniform(0, 255, (3, 3))
        pixels = colours[0] * x + colours[1] * y * (1 - x) + colours[2] * (1 - y) * (1 - x)
        pixels += random.normal(0, 12, pixels.shape)
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        draw = ImageDraw.Draw(image)
        for _ in range(6):
            corner = random.uniform(0, 0.8, 2) * (width, height)
            box = [*corner, *(corner + random.uniform(0.05, 0.4, 2) * (width, height))]
            shape = draw.ellipse if random.random() < 0.5 else draw.rectangle
            shape(box, fill=tuple(int(c) for c in random.integers(0, 256, 3)))
        yield Sample(IMAGE, (image,), f"drawn picture {number}")
