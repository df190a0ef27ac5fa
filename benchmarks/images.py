"""Speed of the image tower beside transformers', same weights, in one process, round by round.

    python -m benchmarks.images CHECKPOINT [--tiles 4] [--threads 1] [--rounds 5] [--recipes fp32 int8]

A tile becomes features through tower, adapter and projector. Random pixels, new ones in every round, because features
are remembered by content. The error is that of the features relative to transformers', root mean square.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.table import Table

from herdgraph.model.checkpoint.rotated import Rotation
from herdgraph.model.quantization.recipes import RECIPES
from herdgraph.runtimes.bundle.manifest import Bundle
from herdgraph.runtimes.executors.options import ExecutorOptions
from herdgraph.runtimes.executors.ort.load import load_vision

from .contestants import ours
from .peers import let_torchvision_import
from .screen import show_tables

Tower = Callable[[np.ndarray], np.ndarray]


def transformers_tower(checkpoint: Path) -> Tower:
    """Transformers' tower and projector in float32."""
    let_torchvision_import()
    from transformers import Llama4ForConditionalGeneration

    model = Llama4ForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tower, projector = model.vision_model, model.multi_modal_projector

    def features(pixels: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            hidden = tower(pixel_values=torch.from_numpy(pixels)).last_hidden_state
            return projector(hidden).flatten(0, -2).numpy()

    return features


def bundle_tower(directory: Path, threads: int) -> Tower:
    """The tower of a bundle."""
    bundle = Bundle.open(directory, verify=False)
    vision = load_vision(bundle, ExecutorOptions(threads))
    assert vision is not None, "a bundle of a model with images"
    features = vision.features
    if not RECIPES[bundle.manifest.recipe].rotated:
        return features
    rotate = Rotation(bundle.manifest.config.text.hidden_size)
    back = rotate(torch.eye(rotate.width)).T.numpy()  # an orthogonal matrix: its transpose undoes it
    return lambda pixels: features(pixels) @ back


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--tiles", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--recipes", nargs="+", default=["fp32", "int8"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    towers = {"transformers fp32": transformers_tower(args.checkpoint)}
    towers |= {f"herdgraph {found.name.split()[-1]}": bundle_tower(found.model, args.threads)
               for found in ours(args.checkpoint, args.recipes)}
    side = Bundle.open(ours(args.checkpoint, args.recipes[:1])[0].model, verify=False).manifest.config.vision.image_size
    seconds: dict[str, list[float]] = {name: [] for name in towers}
    errors: dict[str, float] = {}
    random = np.random.default_rng(0)
    for _ in range(args.rounds + 1):  # the first warms up
        pixels = random.normal(size=(args.tiles, 3, side, side)).astype(np.float32)
        outputs = {}
        for name, tower in towers.items():
            started = time.perf_counter()
            outputs[name] = tower(pixels)
            seconds[name].append(time.perf_counter() - started)
        exact = outputs["transformers fp32"]
        errors = {name: float(np.linalg.norm(out - exact) / np.linalg.norm(exact)) for name, out in outputs.items()}
    theirs = seconds["transformers fp32"][1:]
    table = Table("", "tiles/s", "times transformers", "error", title=f"{args.tiles} tiles, {args.threads} thread(s)")
    for name, times in seconds.items():
        ratio = statistics.median(other / own for other, own in zip(theirs, times[1:], strict=True))
        table.add_row(name, f"{args.tiles / statistics.median(times[1:]):.2f}", f"{ratio:.2f}", f"{errors[name]:.1e}")
    show_tables(table)


if __name__ == "__main__":
    main()
