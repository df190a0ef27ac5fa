"""What is fuzzed: for every subject its sound inputs, and how one case damages and reads them.

A case returns normally when its input was accepted, and raises ``HerdError`` when it was refused. What it returns is
empty, or says why this input should never have been accepted.
"""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import odd, sound
from .mutations import LARGE, damage_file, odd_file

Case = Callable[[Path, random.Random], str]


@dataclass(frozen=True)
class Subject:
    """Something that strangers' files or values go into.

    Attributes:
        name: of the subject.
        build: writes the sound inputs into a directory.
        run: damages a copy of them and reads it.
        mixed: a case takes one of the directories among the inputs, drawn at random.
    """

    name: str
    build: Callable[[Path], object]
    run: Case
    mixed: bool = False

    def prepare(self, folder: Path) -> Path:
        """The sound inputs, written once into a folder that later workers share."""
        base = folder / self.name
        if not base.exists():
            partial = Path(tempfile.mkdtemp(prefix=f"{self.name}-partial-", dir=folder))  # others keep theirs
            self.build(partial)
            partial.rename(base)
        return base


def _pick(place: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(path for path in place.rglob("*") if path.is_file() and not path.is_symlink()))


# -- bundles -----------------------------------------------------------------------------------------------------------


def _generate(bundle: Path, rng: random.Random) -> None:
    from herdgraph.runtimes import Engine

    with Engine.load(bundle, threads=1, memory=rng.choice(("fast", "fast", "low"))) as engine:
        picture = {"type": "image", "image": sound.picture()}
        engine.generate([{"role": "user", "content": [picture, {"type": "text", "text": "Hello"}]}], max_new_tokens=2)


def _altered_bundle(bundle: Path, rng: random.Random) -> str:
    """Any file damaged as an accident would: only a manifest's own free texts may pass."""
    path = _pick(bundle, rng)
    before = path.read_bytes()
    told = damage_file(path, rng)
    _generate(bundle, rng)
    changed = path.name != "manifest.json" and (not path.is_file() or path.read_bytes() != before)
    return f"{told} was used without a word" if changed else ""


def _forged_bundle(bundle: Path, rng: random.Random) -> str:
    """Damaged by somebody who knows the format: sizes and hashes fit again."""
    path = rng.choice([other for other in sorted(bundle.rglob("*")) if other.is_file() and other.suffix != ".data"])
    damage_file(path, rng)
    manifest = bundle / "manifest.json"
    try:
        if not manifest.is_file() or manifest.stat().st_size > LARGE:
            raise ValueError("nothing to mend")
        raw = json.loads(manifest.read_text(encoding="utf-8"))
        for name, entry in raw["files"].items():
            small = (bundle / name).is_file() and (bundle / name).stat().st_size < 1 << 26
            data = (bundle / name).read_bytes() if small else b""
            entry |= {"bytes": (bundle / name).stat().st_size, "sha256": hashlib.sha256(data).hexdigest()}
        manifest.write_text(json.dumps(raw), encoding="utf-8")
    except (ValueError, OSError, KeyError, TypeError, AttributeError, RecursionError):
        pass  # not to be mended: read as it is
    _generate(bundle, rng)
    return ""


# -- checkpoints -------------------------------------------------------------------------------------------------------


def _checkpoint(directory: Path, rng: random.Random) -> str:
    from herdgraph.model.checkpoint import open_checkpoint

    if rng.random() < 0.1:
        odd_file(directory / rng.choice(("model.safetensors.index.json", "params.json", "model-2.safetensors")), rng)
    damage_file(_pick(directory, rng), rng)
    with open_checkpoint(directory) as checkpoint:
        checkpoint.fingerprint()
        for name in checkpoint.tensors:
            checkpoint.read(name)
    return ""


def _gguf(directory: Path, rng: random.Random) -> str:
    from herdgraph.model.upcycle.convert import upcycle

    path = directory / "model.gguf"
    if rng.random() < 0.5:
        sound.write_gguf(path, odd=rng)
    else:
        damage_file(path, rng)
    upcycle(path, directory / "out", experts=2, mode=rng.choice(("split", "copy")), dtype="float32")
    return ""


# -- text and pictures -------------------------------------------------------------------------------------------------


def _processor(directory: Path, rng: random.Random) -> str:
    from herdgraph.model.config.presets import TINY
    from herdgraph.model.processing import PromptProcessor

    damage_file(_pick(directory, rng), rng)
    processor = PromptProcessor(directory, TINY)
    parts = [{"type": "image", "image": sound.picture()}, {"type": "text", "text": "Hello"}]
    prompt = processor.prepare([{"role": "user", "content": parts}])
    processor.tokenizer.decode(prompt.token_ids)
    return ""


def _template(directory: Path, rng: random.Random) -> str:
    from herdgraph.model.config.presets import TINY
    from herdgraph.model.processing import PromptProcessor

    (directory / "chat_template.jinja").write_text(odd.hostile_template(rng), encoding="utf-8")
    PromptProcessor(directory, TINY).prepare([{"role": "user", "content": "Hello"}])
    return ""


def _image(directory: Path, rng: random.Random) -> str:
    from herdgraph.model.processing.images import ImageProcessor

    path = _pick(directory, rng)
    if rng.random() < 0.9:
        damage_file(path, rng)
    as_bytes = path.is_file() and path.stat().st_size <= LARGE and rng.random() < 0.5
    tiled = ImageProcessor(side=28).process(path.read_bytes() if as_bytes else path)
    return "" if tiled.pixels.shape[1:] == (3, 28, 28) else f"tiles of shape {tiled.pixels.shape}"


def _video(directory: Path, rng: random.Random) -> str:
    from herdgraph.model.processing import FrameSampling, load_video

    path = _pick(directory, rng)
    if rng.random() < 0.9:
        damage_file(path, rng)
    sampling = FrameSampling(max_frames=rng.choice((1, 3, 32)), strategy=rng.choice(("uniform", "keyframes")))
    frames = load_video(path, sampling)
    return "" if 1 <= len(frames) <= sampling.max_frames else f"{len(frames)} frames of {sampling}"


def _call(bundle: Path, rng: random.Random) -> str:
    """Prompts and options of every kind into an engine."""
    from herdgraph.runtimes import Engine

    with Engine.load(bundle, threads=1) as engine:
        stray = _control_tokens_of_the_user(engine, rng)
        if stray:
            return stray
        prompt, options = odd.odd_request(rng)
        engine.generate(prompt, **{"max_new_tokens": 2, **options})
    return ""


def _control_tokens_of_the_user(engine: object, rng: random.Random) -> str:
    """Forged control tokens, split over parts, roles and fields, never become real ones."""
    from herdgraph.runtimes import Engine

    assert isinstance(engine, Engine)
    tokenizer = engine.processor.tokenizer
    found = [
        sum(token in tokenizer.special_ids for token in engine.processor.prepare(messages).token_ids)
        for messages in odd.forged_conversation(rng)
    ]
    return "" if found[0] == found[1] else f"{found[1] - found[0]} control tokens were forged"


# -- data --------------------------------------------------------------------------------------------------------------


def _data(directory: Path, rng: random.Random) -> str:
    from herdgraph.model.data import open_samples

    path = _pick(directory, rng)
    if rng.random() < 0.5 and path.suffix == ".jsonl":
        path.write_bytes(odd.odd_row(rng))
    else:
        damage_file(path, rng)
    samples = open_samples([directory if rng.random() < 0.3 else path])
    for index in range(len(samples)):
        record = samples[index]
        samples.key(index)
        assert record.origin
    return ""


def _calibration(directory: Path, rng: random.Random) -> str:
    from herdgraph.export.pipeline import plan_build
    from herdgraph.model.checkpoint import open_checkpoint

    path = rng.choice([other for other in sorted((directory / "calibration").rglob("*")) if other.is_file()])
    scales = path.read_bytes() if path.suffix == ".safetensors" else b""
    damage_file(path, rng)
    with open_checkpoint(directory / "checkpoint") as checkpoint:
        plan = plan_build(checkpoint, directory / "out", recipe="fp8", calibration=directory / "calibration")
        plan.run()
    return odd.odd_numbers(path) if scales else ""


ONE_BY_ONE = (
    Subject("altered bundles", sound.write_bundle, _altered_bundle),
    Subject("forged bundles", sound.write_bundle, _forged_bundle),
    Subject("checkpoints", sound.write_checkpoint, _checkpoint),
    Subject("Meta checkpoints", sound.write_meta_checkpoint, _checkpoint),
    Subject("GGUF", lambda place: sound.write_gguf(place / "model.gguf"), _gguf),
    Subject("processors", sound.write_processor, _processor),
    Subject("templates", sound.write_processor, _template),
    Subject("images", sound.write_images, _image),
    Subject("videos", sound.write_videos, _video),
    Subject("requests", sound.write_bundle, _call),
    Subject("data", sound.write_data, _data),
    Subject("calibrations", sound.write_calibration, _calibration),
)


def _build_all(place: Path) -> None:
    for subject in ONE_BY_ONE:
        subject.prepare(place)


def _one_of_all(place: Path, rng: random.Random) -> str:
    """A case of the subject whose inputs were drawn: one worker for all of them."""
    subject = SUBJECTS[place.name]
    found = subject.run(place, rng)
    return f"{subject.name}: {found}" if found else ""


SUBJECTS = {subject.name: subject for subject in (*ONE_BY_ONE, Subject("mixed", _build_all, _one_of_all, mixed=True))}
