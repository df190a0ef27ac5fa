"""How a calf is made: a herd member small enough for one CPU, by the recipes that a large one takes.

    python -m examples.calf.make_data
    python -m examples.calf.train [--work .cache/calf] [--threads 2] [--install]

1. ``align``: the image tower learns to see, pictures drawn to their names;
2. ``pretrain``: a teacher with that tower learns captions, answers and prose, fused from the first layer;
3. ``distil``: the calf, with the same tower, learns from the teacher and from the text.

A step whose result exists is not repeated, one that was cut off goes on from its last checkpoint. ``--install`` puts
the result into the package, where ``herdgraph build calf`` and ``make demo`` find it.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from herdgraph.console import progress, stderr, table
from herdgraph.files import atomic_directory
from herdgraph.model.checkpoint.base import PROCESSOR_FILES
from herdgraph.model.config import HerdConfig, to_hf
from herdgraph.model.llama4.model import Llama4
from herdgraph.model.training.moe.experts import ExpertOptions
from herdgraph.model.training.optim import OptimizerOptions
from herdgraph.model.training.runs import (
    AlignOptions,
    DistilOptions,
    PretrainOptions,
    align,
    distil,
    pretrain,
)
from herdgraph.model.training.runs.run import save_model
from herdgraph.model.training.runs.start import open_model
from herdgraph.model.training.state import TrainProgress
from herdgraph.model.training.train_options import TrainOptions

from . import CALF
from .config import graft, student_config, teacher_config

EXPERTS = ExpertOptions(bias_rate=0, balance_loss=0.01)
"""An even load by a loss: with four experts a bias would choose otherwise than the served router does."""


def prepared(directory: Path, config: HerdConfig, tokenizer: Path) -> Path:
    """A directory with configuration and processor files: what ``fresh=true`` begins from."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in PROCESSOR_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, directory / name)
    (directory / "config.json").write_text(json.dumps(to_hf(config), indent=2) + "\n", encoding="utf-8")
    return directory


def grafted(directory: Path, config: HerdConfig, tower: Path) -> Path:
    """A checkpoint with random weights but for the image tower."""
    torch.manual_seed(0)
    save_model(directory, config, dict_of(graft(Llama4(config), open_model(tower))), tower)
    return directory


def dict_of(model: Llama4) -> dict[str, torch.Tensor]:
    """A model's weights by canonical name."""
    return {name.removeprefix("decoder.").removeprefix("vision."): value.detach()
            for name, value in model.named_parameters()}


def train(work: Path, steps: tuple[int, int, int]) -> Path:
    """All three steps; the calf's checkpoint."""
    data, tokenizer = work / "data", work / "tokenizer"
    texts = tuple(data / f"{name}.jsonl" for name in ("train", "pairs", "text"))
    tower, teacher, calf = work / "tower", work / "teacher", work / "calf"
    start = prepared(work / "student", student_config(), tokenizer)
    aligning = AlignOptions(checkpoint=start, fresh=True, data=(data / "pairs.jsonl",), output=tower, rows=16,
                            held_out=0, **_loop(steps[0], learning_rate=1e-3))
    _step("align the image tower", aligning, align)
    grafted(work / "teacher-start", teacher_config(), tower / "model")
    teaching = PretrainOptions(checkpoint=work / "teacher-start", data=texts, output=teacher, held_out=0.01,
                               **_loop(steps[1], learning_rate=2e-3))
    _step("train the teacher", teaching, pretrain)
    distilling = DistilOptions(checkpoint=tower / "model", teacher=teacher / "model", data=texts, output=calf,
                               held_out=0.01, **_loop(steps[2], learning_rate=3e-3))
    _step("distil the calf", distilling, distil)
    return calf / "model"


def _loop(steps: int, learning_rate: float) -> dict[str, Any]:
    """What all three have in common."""
    return {
        "train": TrainOptions(steps=steps, precision="bf16", log_every=25, evaluate_every=250, save_every=250),
        "optimizer": OptimizerOptions(learning_rate=learning_rate, warmup=100, final=0.05), "experts": EXPERTS,
    }


def _step(title: str, options: Any, recipe: Callable[..., object]) -> None:
    """Run a recipe, unless its result is there."""
    if (options.output / "model" / "config.json").is_file():
        stderr.print(f"[dim]{title}: done before ({options.output})[/dim]")
        return
    with progress() as bar:
        task = bar.add_task(title, total=options.train.steps)

        def on_step(done: TrainProgress, record: dict[str, float]) -> None:
            bar.update(task, completed=done.step, description=f"{title}: loss {record['loss']:.3f}")

        recipe(options, on_step)


def install(checkpoint: Path) -> None:
    """Put a checkpoint into the package."""
    with atomic_directory(CALF, overwrite=True, mark="config.json") as directory:
        for path in checkpoint.iterdir():
            shutil.copyfile(path, directory / path.name)


def main() -> None:
    """Train it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(".cache/calf"))
    parser.add_argument("--steps", type=int, nargs=3, metavar=("TOWER", "TEACHER", "CALF"), default=(1000, 3800, 4000),
                        help="of the three stages")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--install", action="store_true", help="put the calf into the package")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    checkpoint = train(options.work, tuple(options.steps))
    if options.install:
        install(checkpoint)
    table("the calf", {"checkpoint": str(checkpoint), "installed": str(CALF) if options.install else "no",
                       "try next": f"python -m benchmarks.calf {options.work}"})


if __name__ == "__main__":
    main()
