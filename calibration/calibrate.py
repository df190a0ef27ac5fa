"""Calibration from a checkpoint and data to a directory: measure, check coverage, search, evaluate, report.

>>> with open_checkpoint("scout") as checkpoint:
...     calibrate(checkpoint, Path("calib"), data_of(checkpoint, read_samples([], images=True)))
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from .. import __version__
from ..errors import HerdError
from ..files import atomic_directory, check_output, require_room
from ..model.checkpoint import Checkpoint
from ..model.checkpoint.reader import TensorReader
from ..model.checkpoint.tensors.write import write_tensors
from ..model.quantization.calibration_check import hessian_bytes
from ..model.quantization.calibration_file import (
    DESCRIPTION,
    FORMAT,
    HESSIANS,
    INPUT_ENERGY,
    KV_AMAX,
    SCALES,
    identity,
)
from ..model.quantization.observers import OBSERVERS
from ..model.quantization.outliers import outlier_channels
from ..model.quantization.parts import parts_of
from ..model.quantization.recipes import RECIPES, Caches, Recipe
from .evaluate import Evaluation, Quality, evaluate
from .matmul_backends import Quantized
from .measure import Measured, kept_for_later, measure, parts_to_measure
from .report import write_report
from .search import search
from .windows import Data, Window

logger = logging.getLogger(__name__)

WORST = 3
"""Layers of which the report says what high precision would win."""


@dataclass(frozen=True)
class Options:
    """How to calibrate.

    Attributes:
        observer: whose largest magnitudes a build uses; all are stored.
        min_tokens_shown: tokens that every expert is shown (``coverage.py``).
        min_tokens: tokens that every expert must get from the router itself.
        under_covered: what happens when one gets fewer.
        high_precision: parts (``model/quantization/parts.py``) that stay in high precision.
        max_kl: bound on the mean KL per token: the fewest further parts that hold it stay in high precision; None for
            no search.
        kv: how the evaluation stores keys and values.
        hessians: measure Hessians too, which 4-bit weights are rounded by.
    """

    observer: str = "mse"
    min_tokens_shown: int = 64
    min_tokens: int = 1
    under_covered: Literal["warn", "fail"] = "warn"
    high_precision: tuple[str, ...] = ()
    max_kl: float | None = None
    kv: Caches = "float"
    hessians: bool = True


@dataclass(frozen=True)
class CalibrationProgress:
    """Hooks for a display.

    Attributes:
        stage: called with the name of a step and how many parts it has.
        part: called after each part.
    """

    stage: Callable[[str, int], None] = lambda _name, _parts: None
    part: Callable[[], None] = lambda: None


def calibrate(
    checkpoint: Checkpoint, output: Path, data: Data, options: Options | None = None, *, overwrite: bool = False,
    progress: CalibrationProgress | None = None,
) -> dict[str, Any]:
    """Calibrate a checkpoint.

    Args:
        checkpoint: an open checkpoint.
        output: directory to create.
        data: windows to measure and to evaluate on.
        options: what is measured and what is refused, None for the defaults.
        overwrite: replace an existing calibration.
        progress: hooks for a display.

    Returns:
        The content of ``calibration.json``.

    Raises:
        HerdError: an output that cannot be written, options that cannot be met, a weight or an input that is not
            finite, experts with too few tokens (``under_covered``), or a bound on KL that no choice keeps.
    """
    check_output(output, overwrite=overwrite, mark=DESCRIPTION, inputs=[checkpoint.directory])
    options, progress = options or Options(), progress or CalibrationProgress()
    _check_options(options, data)
    kept = _kept(checkpoint, data, options)
    # 1. Measure. Unfinished work lies beside the output, for the next run of the same key.
    work = output.absolute().with_name(f".{output.name}.calibrating")
    if options.hessians:
        _require_room_for_hessians(checkpoint, output, work)
    key = repr((checkpoint.fingerprint(), data.digest(), options.hessians, options.min_tokens_shown, __version__))
    progress.stage("measuring", checkpoint.config.text.num_layers)
    measured = measure(checkpoint, data, work, key=key, min_tokens_shown=options.min_tokens_shown,
                       with_hessians=options.hessians, on_part=lambda _: progress.part())
    _check_coverage(measured, options)
    # 2. Choose the parts in high precision and evaluate the result on what was held out.
    found = _SearchResult(high_precision_parts=kept)
    if data.held_out:
        make_backend = backend_factory(measured.amaxes, options.observer)
        _search_and_evaluate(checkpoint, options, make_backend, data.held_out, found, progress)
    # 3. Write all of it, or nothing.
    description, parts = _description(checkpoint, data, options, measured, found), parts_to_measure(checkpoint, data)
    with atomic_directory(output, overwrite=overwrite, mark=DESCRIPTION, inputs=[checkpoint.directory]) as directory:
        try:
            if (work / HESSIANS).is_dir():  # linked, not moved: until the output is there, the work must stay whole
                shutil.copytree(work / HESSIANS, directory / HESSIANS, copy_function=_link)
            write_tensors(measured.amaxes, directory / SCALES)
            (directory / DESCRIPTION).write_text(json.dumps(description, indent=1), encoding="utf-8")
            write_report(directory / "report.html", description)
        except OSError as error:
            raise HerdError(f"writing {output} failed: {error.strerror or error}; "
                            f"{kept_for_later(work, parts)}") from error
    shutil.rmtree(work, ignore_errors=True)
    return description


@dataclass
class _SearchResult:
    """What search and evaluation found.

    Attributes:
        high_precision_parts: as a recipe's rules call them.
        evaluation: of the recipe that was chosen.
        tried: quality by the parts in high precision.
        worst: quality with one of the worst layers in high precision, by layer.
    """

    high_precision_parts: tuple[str, ...] = ()
    evaluation: Evaluation | None = None
    tried: dict[str, Quality] = field(default_factory=dict)
    worst: dict[int, Quality] = field(default_factory=dict)


def backend_factory(amaxes: dict[str, Tensor], observer: str) -> Callable[[Recipe], Quantized]:
    """What makes the FP8 backend of a recipe.

    Args:
        amaxes: magnitudes and energies, named as ``model/quantization/calibration_file.py`` says.
        observer: whose magnitudes are used.
    """

    def input_amax(name: str) -> Tensor:
        return amaxes[f"{observer}/{name}"]

    def outliers(name: str) -> Tensor | None:
        return outlier_channels(amaxes.get(f"{INPUT_ENERGY}/{name}"))

    def kv_amax(name: str) -> tuple[float, float]:
        key, value = amaxes[f"{observer}/{name}.{KV_AMAX}"].tolist()
        return key, value

    return lambda recipe: Quantized(recipe, input_amax, outliers, kv_amax)


def _check_options(options: Options, data: Data) -> None:
    if options.observer not in OBSERVERS:
        raise HerdError(f"no observer is called {options.observer!r}: choose one of {', '.join(OBSERVERS)}")
    if options.max_kl is not None and not data.held_out:
        raise HerdError(f"KL cannot be kept within {options.max_kl:g}, because no data is held out: give more data or "
                        "no bound")


def _require_room_for_hessians(checkpoint: Checkpoint, output: Path, work: Path) -> None:
    kept = sum(path.stat().st_size for path in (work / HESSIANS).glob("*"))
    needed = hessian_bytes(checkpoint.config) - kept
    require_room(output, needed, "a calibration with Hessians (--no-hessians leaves them out)")


def _link(source: str, target: str) -> None:
    """A second name for a file where the file system can give one, else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _kept(source: TensorReader, data: Data, options: Options) -> tuple[str, ...]:
    """What stays in high precision whatever is found: what was asked for, and the image tower if it saw no picture.

    Raises:
        HerdError: the model has no such part.
    """
    parts, names = parts_of(source.config), list(options.high_precision)
    absent = next((name for name in names if name not in parts), None)
    if absent is not None:
        raise HerdError(f"this model has no {absent} to keep in high precision: choose among {', '.join(parts)}")
    if "images" in parts and "images" not in names and all(window.pixels is None for window in data.measured):
        logger.warning("the model sees, and the data has no pictures: the image tower will stay in high precision in "
                       "fp8")
        names.append("images")
    return tuple(rule for name in names for rule in parts[name])


def _check_coverage(measured: Measured, options: Options) -> None:
    if options.under_covered == "fail":
        measured.coverage.require(options.min_tokens)
        return
    if poor := measured.coverage.below(options.min_tokens):
        layer, expert, count = poor[0]
        logger.warning("%d experts got fewer than %d tokens from the router (layer %d expert %d: %d); they were shown "
                       "the tokens closest to being sent", len(poor), options.min_tokens, layer, expert, count)


def _search_and_evaluate(
    source: TensorReader, options: Options, make_backend: Callable[[Recipe], Quantized], windows: list[Window],
    found: _SearchResult, progress: CalibrationProgress,
) -> None:
    layers, parts = source.config.text.num_layers, parts_of(source.config)
    recipe = replace(RECIPES["fp8"], caches=options.kv).with_high_precision(found.high_precision_parts)
    if options.max_kl is not None:
        progress.stage("searching", 2 * layers)
        names, found.tried = search(source, recipe, make_backend, windows, options.max_kl, progress.part)
        found.high_precision_parts += tuple(rule for name in names for rule in parts[name])
        recipe = recipe.with_high_precision(found.high_precision_parts)
    progress.stage("evaluating", layers)
    chosen = make_backend(recipe)
    found.evaluation = evaluate(source, {"chosen": chosen}, windows, local=chosen, on_layer=progress.part)
    errors = [max(pair) for pair in found.evaluation.layer_errors]
    worst = sorted(range(layers), key=lambda layer: -errors[layer])[:WORST]
    progress.stage("evaluating the worst layers", layers)
    variants = {str(layer): make_backend(recipe.with_high_precision([f"layers.{layer}"])) for layer in worst}
    better = evaluate(source, variants, windows, on_layer=progress.part)
    found.worst = {int(layer): quality for layer, quality in better.variants.items()}


def _description(
    checkpoint: Checkpoint, data: Data, options: Options, measured: Measured, found: _SearchResult
) -> dict[str, Any]:
    evaluation = found.evaluation
    return {
        "format": FORMAT, **identity(checkpoint),
        "observer": options.observer, "hessians": options.hessians,
        "high_precision_parts": list(found.high_precision_parts),
        "versions": {"herdgraph": __version__, "torch": metadata.version("torch")},
        "data": {"sha256": data.digest(), "tokens": data.tokens, "windows": len(data.measured),
                 "held_out_windows": len(data.held_out),
                 "tiles": sum(len(window.pixels) for window in data.measured if window.pixels is not None)},
        "coverage": {
            "min_tokens_shown": options.min_tokens_shown,
            "own": {str(layer): own.tolist() for layer, own in measured.coverage.own.items()},
            "shown": {str(layer): shown.tolist() for layer, shown in measured.coverage.shown.items()},
            "dead": [[layer, expert] for layer, expert, _ in measured.coverage.below(1)],
        },
        "inputs": measured.inputs,
        "quality": None if evaluation is None else {
            "tokens": evaluation.tokens, "exact_perplexity": evaluation.exact_perplexity,
            **asdict(evaluation.variants["chosen"]), "layer_errors": [list(pair) for pair in evaluation.layer_errors],
            "layers_in_high_precision": {str(layer): asdict(quality) for layer, quality in found.worst.items()},
            "tried": {name: asdict(quality) for name, quality in found.tried.items()},
        },
    }

