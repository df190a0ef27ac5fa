"""Videos with questions: emoji, one after the other.

The npm package ``@lobehub/fluent-emoji-anim-1`` (drawings by Microsoft, MIT) holds moving emoji. Their names tell the
thing and not the motion, so that a question about one of them alone could be answered from any frame. Joined, they
have an order and times, which ``clip_questions.py`` asks for.

To bind what is seen to its time is learned from more things than there are animations: drawings of all trained emoji
are joined as well, a view a second, and shapes, whose names are learned soon.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random

from PIL import Image, ImageSequence

from .captions import Row, conversation, write_rows
from .clip_questions import Clip, Question, Scene, one_question, several_questions
from .emoji import SIDE, Emoji, chance
from .npm import fetch_package

VERSION = "1.0.0"
LICENCE = "Fluent Emoji (animated), Copyright Microsoft, MIT, https://github.com/microsoft/fluentui-emoji"
FRAMES = (0, 8, 16)
"""Which frames of an animation are used; they play at some 24 in a second. Six of ten files hold one frame only."""
OTHER_FRAMES = (4, 12)
"""Which frames new clips of trained animations are made of."""
ANIMATORS = "fluent"
"""Hands whose drawings look like the animations."""
MOST = 3
"""Scenes in one clip."""
SHARES = (0.4, 0.3, 0.3)
"""Of clips of animations, of drawings and of shapes, to train on."""

Draw = Callable[[Random, int], list[Scene]]
"""So many scenes by lot."""


def fetch_animations(cache: Path) -> Path:
    """The package in a cache directory, fetched when it is not there (165 MB).

    Raises:
        HerdError: there is no npm, no network or no such package.
    """
    target = cache / f"fluent-emoji-anim-{VERSION}"
    return fetch_package(f"@lobehub/fluent-emoji-anim-1@{VERSION}", target, ("assets/", "package.json"), "package.json")


def write_clips(
    directory: Path, emoji: Sequence[Emoji], animated: Sequence[Emoji], package: Path, *, clips: int = 16000,
    asked: int = 600, held_out: float = 0.2, seed: int = 0,
) -> dict[str, int]:
    """Write ``clips.jsonl`` to train on, and two files to evaluate on, one question a row.

    ``clips_new.jsonl`` joins the animations that are trained anew, by other frames where they have others;
    ``clips_test.jsonl`` joins animations of emoji that are in no trained clip.

    Args:
        directory: of the data; frames go to ``pictures/``, ``pairs.jsonl`` and
            ``shape_names.jsonl`` tell what else there is.
        emoji: whose drawings are trained on.
        animated: those of them that are looked for in the package.
        package: of ``fetch_animations``.
        clips: rows to train on.
        asked: rows to evaluate on, in each file.
        held_out: share of the animations that is evaluated on.
        seed: of what is joined and asked.
    """
    moving = sorted((one for one in animated if _path(package, one).is_file()),
                    key=lambda one: chance(f"clip {one.code}"))
    count = max(MOST + 1, round(held_out * len(moving)))
    unseen, trained = moving[:count], moving[count:]
    never, learned, new = ([_animation(one, frames, package, directory) for one in several] for several, frames in (
        (unseen, FRAMES), (trained, FRAMES), (trained, OTHER_FRAMES)))
    drawings, shapes = _drawings(directory, emoji, {one.code for one in unseen}), shape_scenes(directory)

    def training(random: Random, count: int) -> list[Scene]:
        kind = random.choices(("animations", "drawings", "shapes"), SHARES)[0]
        if kind == "drawings":
            return [random.choice(hands) for hands in random.sample(drawings, count)]
        return random.sample(learned if kind == "animations" else shapes, count)

    made: dict[str, Iterator[Row]] = {
        "clips": _rows("clips", training, several_questions, clips, seed),
        "clips_new": _rows("clips_new", lambda random, count: random.sample(new, count), one_question, asked, seed),
        "clips_test": _rows("clips_test", lambda random, count: random.sample(never, count), one_question, asked, seed),
    }
    return {name: write_rows(directory / f"{name}.jsonl", rows) for name, rows in made.items()}


def _rows(
    name: str, draw: Draw, ask: Callable[[Random, Clip], dict[str, Question]], count: int, seed: int
) -> Iterator[Row]:
    for number in range(count):
        random = Random(f"{seed} {name} {number}")
        scenes = draw(random, random.randint(1, MOST))
        clip = Clip(scenes, [random.randint(1, 2) for _ in scenes])
        video = [random.choice(scene.pictures) for scene in clip.at_second]
        asked = ask(random, clip)
        yield {"key": f"{name}-{number}", "kind": " ".join(asked),
               **conversation({"video": video, "fps": 1}, asked.values())}


def _drawings(directory: Path, emoji: Sequence[Emoji], unseen: set[str]) -> list[list[Scene]]:
    """By emoji what each hand drew, in several views; of emoji to evaluate on, hands other than the animations'."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for key, picture, _ in _named(directory / "pairs.jsonl"):
        code, view, _ = key.rsplit("-", 2)
        if not (code in unseen and view.startswith(ANIMATORS)):
            found[code][view.rstrip("0123456789")].append(picture)
    return [[Scene(one.phrase, tuple(views)) for views in found[one.code].values()]
            for one in emoji if one.code in found]


def shape_scenes(directory: Path) -> list[Scene]:
    """Shapes of each kind and color, somewhere else every second."""
    found: dict[str, list[str]] = defaultdict(list)
    for _, picture, name in _named(directory / "shape_names.jsonl"):
        found[name].append(picture)
    return [Scene(f"a {name}", tuple(pictures)) for name, pictures in sorted(found.items())]


def _named(path: Path) -> Iterator[tuple[str, str, str]]:
    """Key, picture and name of rows with one picture."""
    for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        yield row["key"], row["content"][0]["image"], row["content"][1]


def _animation(emoji: Emoji, wanted: Sequence[int], package: Path, directory: Path) -> Scene:
    """An emoji's frames as pictures on white: the wanted ones that it has, the first if it has none of them."""
    names = {}
    with Image.open(_path(package, emoji)) as animation:
        for number, frame in enumerate(ImageSequence.Iterator(animation)):
            if number in wanted or not number:
                names[number] = f"pictures/{emoji.code}-frame{number}.png"
                small = frame.convert("RGBA").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
                ground = Image.new("RGBA", small.size, "white")
                ground.alpha_composite(small)
                ground.convert("RGB").save(directory / names[number], compress_level=1)
            if number == max(wanted):
                break
    return Scene(emoji.phrase, tuple(name for number, name in names.items() if number in wanted) or (names[0],))


def _path(package: Path, emoji: Emoji) -> Path:
    return package / "assets" / f"{emoji.code}.webp"
