"""What distillation is worth, and which weighting of soft and hard targets is worth most: the calf's data, equal steps.

    python -m benchmarks.calf_distillation CALF [--steps 120] [--seeds 0 1 2] [--only NAME ...] [--plot FILE]

CALF is what ``examples/calf/train.py`` works in, with data, tower and teacher. So that a short run learns something,
students learn to name food and drink only, some 130 things. They share the aligned image tower, start from the same
random decoder for a seed and see the same batches; from scratch means labels only. The teacher is the calf's, trained
on a little on food; its targets are computed once (64 best ids and the rest) and read by all. Measured are

* held-out loss: cross-entropy on samples that none was trained on, nats per token;
* right names, greedy and to the last letter: trained emoji in another vendor's drawing, and as drawn.

A run that was measured before is read from CALF/distillation, so the command may be stopped and repeated, and several
may run beside each other with different ``--seeds``.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from examples.calf.config import graft
from herdgraph.console import stderr, stdout
from herdgraph.model.config import read_config
from herdgraph.model.data import JsonLines, open_samples
from herdgraph.model.training.data import Encoder, Loader
from herdgraph.model.training.distill import (
    CachedTeacher,
    CacheSpec,
    CacheWriter,
    DistillationLoss,
    Fixed,
    ModuleTeacher,
    Responsibility,
    TargetCache,
    Weighting,
    tokenizer_hash,
)
from herdgraph.model.training.exact_match import exact_matches
from herdgraph.model.training.moe.experts import ExpertOptions, prepare_for_training
from herdgraph.model.training.objective import Distil, logits_of
from herdgraph.model.training.optim import OptimizerOptions
from herdgraph.model.training.runs import PretrainOptions, pretrain
from herdgraph.model.training.runs.run import RunOptions, train_model
from herdgraph.model.training.runs.start import new_model, open_model
from herdgraph.model.training.train_options import TrainOptions

from .figures import bars

WEIGHTINGS: Mapping[str, Weighting | None] = {"scratch": None, "fixed 0.5": Fixed(0.5), "dynamic": Responsibility()}
CATEGORIES = ("food and drink",)
EVALUATED = {"other_vendor": "other drawing", "seen": "as drawn"}


def compared_data(calf: Path) -> dict[str, Path]:
    """Files to train and to evaluate on, of the chosen categories, beside the pictures: a picture, then its name."""
    data, rows = calf / "data", {}
    for name in ("seen", "other_vendor", "pairs", "text"):
        rows[name] = [json.loads(line) for line in (data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    codes = {_code(row) for row in rows["seen"] if row["category"] in CATEGORIES}
    found = {}
    for name, several in rows.items():
        chosen = [_named(row) for row in several if _code(row) in codes]
        found[name] = data / f"compared-{name}.jsonl"
        found[name].write_text("\n".join(map(json.dumps, chosen)), encoding="utf-8")
    return found


def _code(row: dict[str, Any]) -> str:
    """The emoji's code: keys end in the number of the view or the vendor."""
    return str(row["key"]).removesuffix("-name").rpartition("-")[0]


def _named(row: dict[str, Any]) -> dict[str, Any]:
    """A row to evaluate on as those that are trained on: a picture, then its name."""
    if "messages" not in row:
        return row
    return {"key": row["key"], "content": [row["messages"][0]["content"][0], row["name"]]}


def options_of(calf: Path, output: Path, steps: int, seed: int) -> RunOptions:
    """One run: 2048 tokens a step."""
    files = compared_data(calf)
    return RunOptions(
        data=(files["pairs"], files["text"]), output=output, rows=8, seq_len=256,
        held_out=0.02, held_out_batches=16,
        train=TrainOptions(steps=steps, precision="bf16", seed=seed, log_every=20),
        optimizer=OptimizerOptions(learning_rate=3e-3, warmup=20, final=0.05),
        experts=ExpertOptions(bias_rate=0, balance_loss=0.01),
    )


def adapted_teacher(calf: Path, options: RunOptions) -> Path:
    """The calf's teacher after some more steps on what is compared: a broad one soon knows less of it than students."""
    output = calf / "teacher-compared"
    if not (output / "model" / "config.json").exists():
        stderr.print("training the teacher on what is compared")
        pretrain(PretrainOptions(
            checkpoint=calf / "teacher" / "model", data=options.data, output=output, rows=options.rows,
            seq_len=options.seq_len, held_out=options.held_out, held_out_batches=options.held_out_batches,
            train=TrainOptions(steps=300, precision="bf16", seed=3),
            optimizer=OptimizerOptions(learning_rate=1e-3, warmup=20, final=0.03), experts=options.experts,
        ))
    return output / "model"


def cached_targets(calf: Path, options: RunOptions) -> Path:
    """The teacher's targets for every sample, computed when they are missing."""
    directory, files = calf / "targets", calf / "student"
    config = read_config(files)
    if (directory / "complete").exists():
        return directory
    stderr.print("computing the teacher's targets")
    encoder = Encoder(files, config, max_tokens=options.seq_len, too_long="cut")
    loader = Loader(open_samples(list(options.data)), encoder, rows=options.rows, seq_len=options.seq_len, epochs=1,
                    pad_id=config.text.pad_token_id or 0, shuffle=False)
    teacher = ModuleTeacher(prepare_for_training(open_model(adapted_teacher(calf, options))), logits_of)
    with CacheWriter(directory, CacheSpec(tokenizer=tokenizer_hash(files), vocabulary=config.text.vocab_size),
                     config) as writer:
        for batch in loader:
            if writer.missing(batch):
                with torch.autocast("cpu", torch.bfloat16):
                    writer.add(batch, teacher.targets(batch))
    (directory / "complete").touch()
    return directory


def run(calf: Path, name: str, options: RunOptions) -> dict[str, float]:
    """Train one student and evaluate it."""
    files, weighting, objective = calf / "student", WEIGHTINGS[name], None
    if weighting is not None:
        cache = TargetCache(cached_targets(calf, options), tokenizer=tokenizer_hash(files))
        objective = Distil(CachedTeacher(cache, read_config(files)), DistillationLoss(weighting))
    student = graft(new_model(files, options.train.seed), open_model(calf / "tower" / "model"))
    progress = train_model(student, options, files, objective=objective)
    return {"held_out": progress.held_out[progress.step], **accuracies(calf, options.output / "model")}


def accuracies(calf: Path, checkpoint: Path) -> dict[str, float]:
    """Share of right captions by set."""
    model, encoder = open_model(checkpoint), Encoder(checkpoint, read_config(checkpoint), max_tokens=256)
    found = {}
    files = compared_data(calf)
    for name in EVALUATED:
        samples = JsonLines(files[name])
        right = exact_matches(model, [encoder(samples[index]) for index in range(len(samples))])
        found[name] = sum(right) / len(right)
    return found


def measured(calf: Path, name: str, steps: int, seed: int) -> dict[str, float]:
    """The figures of a run, from the disk when it was made before."""
    directory = calf / "distillation" / f"{name.replace(' ', '-')}-{steps}-{seed}"
    result = directory / "result.json"
    if not result.exists():
        found = run(calf, name, options_of(calf, directory, steps, seed))
        stderr.print(f"{name}, seed {seed}: {found}")
        result.write_text(json.dumps(found), encoding="utf-8")
    figures: dict[str, float] = json.loads(result.read_text(encoding="utf-8"))
    return figures


def report(rows: dict[str, list[dict[str, float]]], steps: int) -> Table:
    """Means over seeds and their spread."""
    table = Table(title=f"the calf after {steps} steps of 2048 tokens, mean and standard deviation over seeds")
    for column in ("weighting", "seeds", "held-out loss", *EVALUATED.values()):
        table.add_column(column)
    for name, found in rows.items():
        cells = []
        for figure in ("held_out", *EVALUATED):
            values, scale = [row[figure] for row in found], 1 if figure == "held_out" else 100
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{scale * statistics.mean(values):.{3 if scale == 1 else 1}f} ± "
                         f"{scale * spread:.{3 if scale == 1 else 1}f}{'' if scale == 1 else ' %'}")
        table.add_row(name, str(len(found)), *cells)
    return table


def main() -> None:
    """Parse the command line, run what is missing, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calf", type=Path)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(WEIGHTINGS), default=list(WEIGHTINGS))
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    rows = {name: [measured(args.calf, name, args.steps, seed) for seed in args.seeds] for name in args.only}
    stdout.print(report(rows, args.steps))
    if args.plot:
        bars(args.plot, f"right names for another vendor's drawings after {args.steps} steps", "%",
             {name: 100 * statistics.mean(row["other_vendor"] for row in found) for name, found in rows.items()})


if __name__ == "__main__":
    main()
