"""Measuring: one pass over the layers, each layer's statistics written when it is done, so that a kill costs one layer.

While it runs there is a hidden directory beside the output: the hidden states after the last finished layer, and one
file of results per finished part (``vision``, ``layers.0``, ...). The same command continues there; another checkpoint,
other data or other options start anew.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import HerdError
from ..files import atomic_file
from ..model.checkpoint.finite import require_finite
from ..model.checkpoint.reader import TensorReader
from ..model.checkpoint.tensors.header import read_header
from ..model.checkpoint.tensors.write import write_tensors
from ..model.quantization.calibration_check import hessian_shapes
from ..model.quantization.calibration_file import HESSIANS, KV_AMAX
from ..model.quantization.observers import OBSERVERS
from ..reading import read_json, read_text
from .coverage import Coverage
from .hessian import HessianSums
from .recording import CalibrationObserver, norm_weights_of
from .stream import DecoderStream, Run, States
from .vision_stream import VisionStream
from .windows import Data, Window

VISION = "vision"
HEAD = "lm_head.weight"
SAMPLED = 2048
"""Tokens, about, that say what a sublayer adds to the residual stream."""


@dataclass
class Measured:
    """What a pass found.

    Attributes:
        amaxes: ``<observer>/<weight>`` to largest magnitudes, as ``calibration_file.py`` stores them.
        inputs: statistics per weight for the report.
        coverage: tokens per expert.
    """

    coverage: Coverage
    amaxes: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)


def measure(
    source: TensorReader, data: Data, work: Path, *, key: str, min_tokens_shown: int = 64, with_hessians: bool = True,
    on_part: Callable[[str], None] = lambda _: None,
) -> Measured:
    """Run the measured windows through a model and record the inputs of its products.

    Args:
        source: the checkpoint.
        data: windows.
        work: directory of unfinished work, created; see this module's first lines.
        key: names checkpoint, data and options: work of another key is thrown away.
        min_tokens_shown: tokens that every expert is to see.
        with_hessians: record Hessians too; of the experts of a layer one is in memory.
        on_part: called with the name of each part when it is done.

    Raises:
        HerdError: a product's input is not finite.
    """
    store = _Store.open(work, hashlib.sha256(key.encode()).hexdigest(), parts_to_measure(source, data))
    result = Measured(Coverage(min_tokens_shown))
    with torch.inference_mode():
        stream = DecoderStream(source)
        tokens = [window.token_ids for window in data.measured]
        x_ND = store.states()
        if x_ND is None:
            x_ND = stream.embed(tokens, _features(source, data.measured, store))
        states = States(x_ND, [len(window) for window in tokens])
        if store.has(VISION):
            store.load(VISION, result)
            on_part(VISION)
        for index in range(source.config.text.num_layers):
            part = f"layers.{index}"
            if not store.has(part):
                coverage = Coverage(min_tokens_shown)
                shapes = hessian_shapes(source.config, index) if with_hessians else {}
                with store.hessians(part, shapes) as hessians, stream.layer(index) as layer:
                    observed = CalibrationObserver(source.config.text, norm_weights_of(layer, index), hessians)
                    begin_SD = _sampled(states)
                    stream.attend(layer, [Run(states, observed)])
                    attended_SD = _sampled(states)
                    stream.feed_forward(index, layer, [Run(states, observed)], coverage)
                    observed.added(f"{part}.self_attn", begin_SD, attended_SD)
                    observed.added(f"{part}.feed_forward", attended_SD, _sampled(states))
                require_finite(states.x_ND, f"the output of {part}")
                store.save(part, observed, coverage, states.x_ND)
            store.load(part, result)
            on_part(part)
        if with_hessians:
            store.save_head(stream.head_hessian(states))
    return result


def _sampled(states: States) -> Tensor:
    """The hidden states of some tokens, spread over all windows."""
    return states.x_ND[:: max(1, len(states.x_ND) // SAMPLED)].clone()


def _features(source: TensorReader, windows: list[Window], store: _Store) -> list[Tensor | None]:
    """Image features of each window; the tower is measured on the way."""
    tiles = [torch.from_numpy(window.pixels) for window in windows if window.pixels is not None]
    if not tiles or source.config.vision is None:
        return [None] * len(windows)
    observed = CalibrationObserver(source.config.text)
    rows = VisionStream(source).features(torch.cat(tiles), observed)
    if not store.has(VISION):
        store.save(VISION, observed, Coverage(0), None)
    per_tile = source.config.vision.tokens_per_tile
    pieces = iter(rows.split([per_tile * len(pixels) for pixels in tiles]))
    return [None if window.pixels is None else next(pieces) for window in windows]


def kept_for_later(work: Path, parts: int) -> str:
    """What unfinished work is worth, for the end of a message.

    Args:
        work: its directory.
        parts: of the whole measurement, ``parts_to_measure``.
    """
    done = sum(1 for _ in work.glob("*.json"))
    return f"{work} keeps {done} of {parts} parts: make room and run the same command again to go on"


def parts_to_measure(source: TensorReader, data: Data) -> int:
    """Layers, and the image tower when pictures are measured."""
    sees = source.config.vision is not None and any(window.pixels is not None for window in data.measured)
    return source.config.text.num_layers + sees


@dataclass(frozen=True)
class _Store:
    """Unfinished work on disk. Files appear whole; the states and the layer that they come after appear together."""

    directory: Path
    parts: int

    @classmethod
    def open(cls, directory: Path, key: str, parts: int) -> _Store:
        mark = directory / "key"
        try:
            if not mark.is_file() or read_text(mark) != key:
                shutil.rmtree(directory, ignore_errors=True)
                directory.mkdir(parents=True)
                mark.write_text(key, encoding="utf-8")
        except OSError as error:
            raise HerdError(f"cannot write to {directory}: {error.strerror}; choose another output") from error
        return cls(directory, parts)

    def has(self, part: str) -> bool:
        return (self.directory / f"{part}.json").exists()

    def states(self) -> Tensor | None:
        """Hidden states after the last layer that is done, None when none is."""
        done = sum(1 for _ in self.directory.glob("layers.*.json"))
        return read_header(self.directory / f"after.{done - 1}.safetensors")["x"].read() if done else None

    @contextmanager
    def hessians(self, part: str, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[HessianSums | None]:
        """Add up the Hessians of a part, if there are any, in a file that is there when all is in it.

        Raises:
            HerdError: it cannot be written.
        """
        if not shapes:
            yield None
            return
        with self._refusals():
            (self.directory / HESSIANS).mkdir(exist_ok=True)
            with atomic_file(self.directory / HESSIANS / f"{part}.safetensors") as path:
                sums = HessianSums(path, shapes)
                yield sums
                sums.finish()

    def save(self, part: str, observed: CalibrationObserver, coverage: Coverage, states: Tensor | None) -> None:
        """Write what a part gave, which the next run need not measure again.

        Raises:
            HerdError: it cannot be written, for instance on a full disk.
        """
        with self._refusals():
            self._write(part, observed, coverage, states)

    def save_head(self, hessian_DD: Tensor) -> None:
        """Write the Hessian of the head's input; errors as ``save``."""
        with self._refusals():
            (self.directory / HESSIANS).mkdir(exist_ok=True)
            with atomic_file(self.directory / HESSIANS / f"{HEAD}.safetensors") as path:
                write_tensors({HEAD: hessian_DD}, path)

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise HerdError(f"writing {self.directory} failed: {error.strerror or error}; "
                            f"{kept_for_later(self.directory, self.parts)}") from error

    def _write(self, part: str, observed: CalibrationObserver, coverage: Coverage, states: Tensor | None) -> None:
        """The description is renamed last: it says that everything else is there."""
        amaxes = observed.amaxes()
        write_tensors(amaxes, self.directory / f"{part}.safetensors")
        if states is not None:
            index = int(part.rsplit(".", 1)[1])
            write_tensors({"x": states.clone()}, self.directory / f"after.{index}.safetensors")
        description = {
            "inputs": described(observed, amaxes),
            "own": {str(layer): own.tolist() for layer, own in coverage.own.items()},
            "shown": {str(layer): shown.tolist() for layer, shown in coverage.shown.items()},
        }
        with atomic_file(self.directory / f"{part}.json") as path:
            path.write_text(json.dumps(description), encoding="utf-8")
        if states is not None and index:
            (self.directory / f"after.{index - 1}.safetensors").unlink(missing_ok=True)

    def load(self, part: str, result: Measured) -> None:
        """Add what a part gave."""
        description = read_json(self.directory / f"{part}.json")
        stored = read_header(self.directory / f"{part}.safetensors")
        result.amaxes |= {name: tensor.read() for name, tensor in stored.items()}
        result.inputs |= description["inputs"]
        for name, found in (("own", result.coverage.own), ("shown", result.coverage.shown)):
            found |= {int(layer): torch.tensor(counts) for layer, counts in description[name].items()}


def described(observed: CalibrationObserver, amaxes: dict[str, Tensor]) -> dict[str, Any]:
    """Statistics of every input, and of keys and values, for the report: lists by expert."""
    stored = {name: (name, histograms) for name, histograms in observed.histograms.items()}
    stored |= {f"{name}.cache": (f"{name}.{KV_AMAX}", list(pair)) for name, pair in observed.caches.items()}
    found = {}
    for name, (key, histograms) in stored.items():
        chosen = {observer: amaxes[f"{observer}/{key}"].reshape(-1).tolist() for observer in OBSERVERS}
        found[name] = {
            "rows": [histogram.rows for histogram in histograms],
            "amax": chosen,
            "clipped": {observer: [histogram.share_beyond(value) for histogram, value in zip(
                histograms, values, strict=True)] for observer, values in chosen.items()},
        }
    return found
