"""What distillation is worth on text: a small student learns from a teacher that knows more than the labels say.

    python -m benchmarks.distillation WORK --teacher DIR --data FILE ... [--width 192] [--layers 4] [--experts 4]
        [--steps 240] [--seeds 0 1 2] [--only NAME ...] [--plot FILE]

The teacher is SmolLM2-135M in Llama 4 form (``herdgraph upcycle MODEL.gguf OUTPUT``) with the tokens of the data alone
(``short_vocabulary.py``), the student a mixture with its tokenizer and random weights. The teacher's targets (64 best
ids and the rest) are computed once and read by all. For a seed all students begin with the same weights and see the
same batches. Measured are

* held-out loss: cross-entropy on text that none was trained on, nats per token;
* KL to the teacher on the same text;
* the share of the tokens that it took to come below the final loss of labels alone;
* processor time, beside that of the targets.

A run that was measured before is read from WORK, one that was cut off goes on, so the command may be stopped and
repeated, and several may run beside each other with different ``--seeds`` or ``--only``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from tokenizers import Tokenizer

from herdgraph.console import stderr, stdout
from herdgraph.files import atomic_file
from herdgraph.model.checkpoint.base import PROCESSOR_FILES
from herdgraph.model.config import HerdConfig, read_config, to_hf
from herdgraph.model.data import JsonLines
from herdgraph.model.training.data import Encoder, Loader
from herdgraph.model.training.distill import (
    CachedTeacher,
    CacheSpec,
    CacheWriter,
    DistillationLoss,
    Fixed,
    ModuleTeacher,
    TargetCache,
    tokenizer_hash,
)
from herdgraph.model.training.moe.experts import prepare_for_training
from herdgraph.model.training.objective import Distil, labelled, logits_of
from herdgraph.model.training.optim import OptimizerOptions
from herdgraph.model.training.parallel.ranks import Ranks
from herdgraph.model.training.runs import DistilOptions, PretrainOptions, distil, pretrain
from herdgraph.model.training.runs.run import RunOptions, loaders
from herdgraph.model.training.runs.start import open_model
from herdgraph.model.training.train_options import TrainOptions

from .figures import curves
from .short_vocabulary import shorten
from .training import config_of

LABELS = "labels"
WEIGHTINGS: Mapping[str, Mapping[str, Any]] = {
    LABELS: {},
    **{f"fixed {soft}": {"weighting": "fixed", "soft": soft} for soft in (0.3, 0.5, 0.7, 0.9, 1.0)},
    "schedule": {"weighting": "schedule", "soft": 0.9}, "dynamic": {"weighting": "dynamic", "soft": 0.5},
    **{f"fixed 0.7, temperature {temperature:g}": {"weighting": "fixed", "soft": 0.7, "temperature": temperature}
       for temperature in (0.7, 1.5, 2.0)},
}


def student_files(args: argparse.Namespace) -> Path:
    """A directory with the student's configuration and the teacher's tokenizer."""
    directory = args.work / f"student-{args.width}-{args.layers}-{args.experts}"
    directory.mkdir(parents=True, exist_ok=True)
    for name in PROCESSOR_FILES:
        if (args.teacher / name).is_file():
            with atomic_file(directory / name) as path:
                shutil.copyfile(args.teacher / name, path)
    teacher, rope = read_config(args.teacher).text, tuple((layer + 1) % 4 != 0 for layer in range(args.layers))
    text = replace(
        config_of(args.experts).text, vocab_size=teacher.vocab_size, bos_token_id=teacher.bos_token_id,
        eos_token_ids=teacher.eos_token_ids, pad_token_id=teacher.pad_token_id, tie_word_embeddings=True,
        hidden_size=args.width, num_layers=args.layers, num_heads=args.width // 32, num_kv_heads=args.width // 96,
        expert_size=args.width, moe_layers=tuple(range(args.layers)), rope_layers=rope, chunked_layers=rope)
    with atomic_file(directory / "config.json") as path:  # others may read it now
        path.write_text(json.dumps(to_hf(HerdConfig(text=text))), encoding="utf-8")
    return directory


def pages_of(args: argparse.Namespace) -> Path:
    """The texts in pages that fill a row, as samples."""
    path = args.work / f"pages-{args.length}.jsonl"
    if not path.is_file():
        tokenizer, step = Tokenizer.from_file(str(args.teacher / "tokenizer.json")), args.length - 4
        ids = [index for text in args.data
               for index in tokenizer.encode(text.read_text(encoding="utf-8"), add_special_tokens=False).ids]
        rows = ({"text": tokenizer.decode(ids[at : at + step])} for at in range(0, len(ids), step))
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def cached_targets(files: Path, args: argparse.Namespace) -> dict[float, Path]:
    """The teacher's targets for every sample by temperature, computed where missing; ``complete`` has the seconds."""
    wanted = {temperature_of(name): args.work / f"targets-{args.length}-{temperature_of(name):g}"
              for name in (LABELS, *args.only)}
    missing = {key: directory for key, directory in wanted.items() if not (directory / "complete").exists()}
    if missing:
        started = time.process_time()
        compute_targets(files, missing, args)
        for directory in missing.values():
            (directory / "complete").write_text(f"{time.process_time() - started:.0f}", encoding="utf-8")
    return wanted


def temperature_of(name: str) -> float:
    """The temperature of a weighting."""
    return float(WEIGHTINGS[name].get("temperature", 1.0))


def compute_targets(files: Path, directories: Mapping[float, Path], args: argparse.Namespace) -> None:
    """Let the teacher read every sample once, and keep its targets at several temperatures."""
    config, tokens, started = read_config(files), 0, time.process_time()
    encoder = Encoder(files, config, max_tokens=args.length, too_long="cut")
    loader = Loader(JsonLines(pages_of(args)), encoder, rows=args.rows, seq_len=args.length, epochs=1,
                    pad_id=config.text.pad_token_id or 0, shuffle=False)
    teacher = ModuleTeacher(prepare_for_training(open_model(args.teacher)), logits_of)
    with ExitStack() as stack:
        writers = [stack.enter_context(CacheWriter(directory, CacheSpec(
            tokenizer=tokenizer_hash(files), vocabulary=config.text.vocab_size, temperature=temperature), config))
            for temperature, directory in directories.items()]
        for batch in loader:
            if any(writer.missing(batch) for writer in writers):
                targets = teacher.targets(batch)
                for writer in writers:
                    writer.add(batch, targets)
            tokens += labelled(batch)
            stderr.print(f"targets of {tokens} tokens, {time.process_time() - started:.0f} s")


def options_of(output: Path, seed: int, args: argparse.Namespace) -> RunOptions:
    """What all runs of a seed share."""
    return RunOptions(
        data=(pages_of(args),), output=output, rows=args.rows, seq_len=args.length, held_out=0.1, held_out_batches=16,
        train=TrainOptions(steps=args.steps, evaluate_every=max(1, args.steps // 12), seed=seed, save_minutes=2),
        optimizer=OptimizerOptions(learning_rate=args.rate, warmup=args.steps // 10, schedule="wsd"))


def run(name: str, output: Path, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train one student and evaluate it."""
    files, shared = student_files(args), vars(options_of(output, seed, args))
    targets, changes = cached_targets(files, args), WEIGHTINGS[name]
    started = time.process_time()
    if name == LABELS:
        progress = pretrain(PretrainOptions(**shared, checkpoint=files, fresh=True))
    else:
        progress = distil(DistilOptions(**shared, checkpoint=files, fresh=True, teacher=targets[temperature_of(name)],
                                        **changes))
    return {"held_out": progress.held_out[progress.step], "by_step": progress.held_out,
            "kl": kl_to_teacher(output / "model", targets[1.0], RunOptions(**shared)),
            "seconds": time.process_time() - started}


@torch.no_grad()
def kl_to_teacher(checkpoint: Path, targets: Path, options: RunOptions) -> float:
    """Mean KL of the teacher's distribution to the student's on the held-out text, nats per token."""
    config, model = read_config(checkpoint), open_model(checkpoint).eval()
    teacher = CachedTeacher(TargetCache(targets, tokenizer=tokenizer_hash(checkpoint)), config)
    objective = Distil(teacher, DistillationLoss(weighting=Fixed(1.0)))
    _, held_out = loaders(options, config, checkpoint, Ranks.alone())
    return sum(float(objective(model, batch, 0)[0]) for batch in held_out) / sum(map(labelled, held_out))


def measured(name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """The figures of a run, from the disk when it was made before."""
    output = args.work / f"{args.width}-{args.layers}-{args.steps}" / f"{name.replace(' ', '-')}-{seed}"
    result = output / "result.json"
    if not result.exists():
        found = run(name, output, seed, args)
        result.write_text(json.dumps(found), encoding="utf-8")
        stderr.print(f"{name}, seed {seed}: held-out loss {found['held_out']:.3f}, KL {found['kl']:.3f}")
    figures: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return figures


def share_of_tokens(found: dict[str, Any], goal: float, steps: int) -> float:
    """Share of the steps at which a held-out loss was first no higher than a goal; infinite if it never was.

    Between two evaluations the loss falls evenly.
    """
    before, higher = 0.0, float("inf")
    for step, loss in found["by_step"].items():
        if loss <= goal:
            left = (goal - loss) / (higher - loss) * (int(step) - before)  # 0 at the first evaluation
            return (int(step) - left) / steps
        before, higher = int(step), loss
    return float("inf")


def report(rows: dict[str, list[dict[str, Any]]], args: argparse.Namespace) -> Table:
    """Means over seeds and their spread."""
    table = Table(title=f"{args.steps} steps of {args.rows * args.length} tokens, width {args.width}, {args.layers} "
                        f"layers; mean and standard deviation over {len(args.seeds)} seed(s)")
    for column in ("weighting", "held-out loss", "KL to teacher", "tokens to labels' loss", "processor seconds"):
        table.add_column(column)
    for name, found in rows.items():
        goals = [one["held_out"] for one in rows.get(LABELS, found)]
        shares = [share_of_tokens(one, goal, args.steps) for one, goal in zip(found, goals, strict=True)]
        table.add_row(name, *(_spread([one[key] for one in found]) for key in ("held_out", "kl")),
                      f"{statistics.mean(shares):.0%}" if max(shares) <= 1 else "never",
                      f"{statistics.mean(one['seconds'] for one in found):.0f}")
    return table


def mean_curve(found: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """Held-out loss by step."""
    return [(int(step), statistics.mean(one["by_step"][step] for one in found)) for step in found[0]["by_step"]]


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}"


def parser_of(purpose: str | None) -> argparse.ArgumentParser:
    """What a benchmark of distillation on text is told."""
    parser = argparse.ArgumentParser(description=purpose, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    for name, default in (("width", 128), ("layers", 4), ("experts", 4), ("steps", 240), ("rows", 2), ("length", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rate", type=float, default=3e-3)
    return parser


def main() -> None:
    """Parse the command line, run what is missing, report."""
    parser = parser_of(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(WEIGHTINGS), default=list(WEIGHTINGS))
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    shorten(args.teacher, args.data, args.work / "teacher")
    args.teacher = args.work / "teacher"
    rows = {name: [measured(name, seed, args) for seed in args.seeds] for name in args.only}
    seconds = (args.work / f"targets-{args.length}-1" / "complete").read_text(encoding="utf-8")
    stdout.print(report(rows, args), f"the teacher's targets took {seconds} s")
    if args.plot:
        curves(args.plot, f"students {args.width} wide, mean over {len(args.seeds)} seed(s)", "step",
               "held-out loss, nats per token", {name: mean_curve(found) for name, found in rows.items()})


if __name__ == "__main__":
    main()
