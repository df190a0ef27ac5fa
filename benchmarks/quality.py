"""What a precision recipe costs on a real model and real English: perplexity and KL per token against fp32.

    python -m benchmarks.quality [CHECKPOINT] [--recipes int8 int8-kv8 int4-rtn int4 int4-gptq]

The text, several pages (Alice in Wonderland; entries of the Jargon File, which is in the public domain), was used to
fit nothing. It is read in windows of 512 tokens. ``int4-rtn`` is the baseline of the 4-bit recipe: the same formats,
every weight rounded to nearest and nothing rotated. ``-gptq`` and ``-kv8`` (8-bit keys and
values) are built with ``--calibration``, on other text.

The last two columns compare a recipe with itself: tokens decoded one by one with the same tokens prefilled, and
decoded in a batch of eight with decoded alone. That is how much a result depends on what else is in the call.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.table import Table

from herdgraph.calibration.calibrate import calibrate
from herdgraph.calibration.samples import read_samples
from herdgraph.calibration.windows import data_of
from herdgraph.console import fail, size, stderr, stdout
from herdgraph.export.pipeline import build_bundle
from herdgraph.export.verify import fidelity
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.quantization.formats import BlockFormat
from herdgraph.model.quantization.recipes import RECIPES, Recipe, Rule
from herdgraph.runtimes import Engine

from .screen import show_tables

TEXTS = [Path(__file__).parent / "data" / name for name in ("alice.txt", "jargon.txt")]
WINDOW = 512
DECODED = 64


def int4_rtn() -> Recipe:
    """The 4-bit recipe without what herdgraph adds to rounding."""
    rules = tuple(
        Rule(rule.part, replace(rule.layout, fitted=False) if isinstance(rule.layout, BlockFormat) else rule.layout)
        for rule in RECIPES["int4"].rules
    )
    return replace(RECIPES["int4"], name="int4", rules=rules, rotated=False)


def build(source: Path, bundle: Path, recipe: str) -> None:
    """Build a bundle by the name of a row of the table."""
    precision = int4_rtn() if recipe == "int4-rtn" else RECIPES[recipe.split("-", maxsplit=1)[0]]
    precision = replace(precision, caches="int8" if "-kv8" in recipe else "float")
    calibration = bundle.with_name("calibration") if "-gptq" in recipe or precision.needs_calibration else None
    with open_checkpoint(source) as checkpoint:
        if calibration and not calibration.exists():
            calibrate(checkpoint, calibration, data_of(checkpoint, read_samples([], images=False)))
        build_bundle(checkpoint, bundle, recipe=precision, calibration=calibration)


def windows(engine: Engine) -> list[list[int]]:
    """All texts as token ids, in equal pieces."""
    ids = [token for text in TEXTS for token in engine.processor.tokenizer.encode(text.read_text(encoding="utf-8"))]
    return [ids[first : first + WINDOW] for first in range(0, len(ids) - WINDOW + 1, WINDOW)]


def prefilled(engine: Engine, texts: list[list[int]]) -> np.ndarray:
    """Logits of every token of every window, [windows · WINDOW, V]."""
    return np.concatenate([engine.prefill(engine.new_sequence(), ids, all_positions=True) for ids in texts])


def perplexity(logits: np.ndarray, texts: list[list[int]]) -> float:
    """The exponential of the mean negative log-likelihood of each next token inside the windows."""
    losses = [
        torch.nn.functional.cross_entropy(torch.from_numpy(logits[n * WINDOW : (n + 1) * WINDOW - 1]).double(),
                                          torch.tensor(ids[1:]))
        for n, ids in enumerate(texts)
    ]
    return float(torch.stack(losses).mean().exp())


def decoded(engine: Engine, texts: list[list[int]], *, batch: bool) -> np.ndarray:
    """Logits of ``DECODED`` tokens in the middle of eight windows, one by one: [steps, 8, V]."""
    sequences = [engine.new_sequence() for _ in texts[:8]]
    for sequence, ids in zip(sequences, texts, strict=False):
        engine.prefill(sequence, ids[: WINDOW // 2])
    steps = []
    for at in range(WINDOW // 2, WINDOW // 2 + DECODED):
        tokens = [ids[at] for ids in texts[:8]]
        steps.append(engine.decode_batch(sequences, tokens) if batch else np.stack(
            [engine.decode(sequence, token) for sequence, token in zip(sequences, tokens, strict=True)]))
    return np.stack(steps)


def _kl(reference: np.ndarray, found: np.ndarray) -> float:
    width = reference.shape[-1]
    return fidelity(reference.reshape(-1, width), found.reshape(-1, width)).mean_kl


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path, default=Path(".cache/demo/checkpoint"))
    parser.add_argument("--recipes", nargs="+", default=["int8", "int8-kv8", "int4-rtn", "int4", "int4-gptq", "fp8"])
    args = parser.parse_args()
    if not args.checkpoint.is_dir():
        fail(f"{args.checkpoint} does not exist: run `make demo` once, or name a checkpoint")
    table = Table(title="quality on English text")
    columns = ("recipe", "bundle", "perplexity", "change", "mean KL", "top-1", "decoded/prefilled", "batch/alone")
    for column in columns:
        table.add_column(column)
    reference = texts = None
    with tempfile.TemporaryDirectory(dir=".cache" if Path(".cache").is_dir() else None) as name:
        for recipe in ("fp32", *args.recipes):
            stderr.print(f"[dim]building and measuring {recipe}[/dim]")
            build(args.checkpoint, Path(name) / recipe, recipe)
            engine = Engine.load(Path(name) / recipe)
            texts = texts or windows(engine)
            found = prefilled(engine, texts)
            reference = found if reference is None else reference
            report, exact = fidelity(reference, found), perplexity(reference, texts)
            alone = decoded(engine, texts, batch=False)
            middle = found.reshape(len(texts), WINDOW, -1)[:8, WINDOW // 2 : WINDOW // 2 + DECODED].swapaxes(0, 1)
            table.add_row(
                recipe, size(engine.bundle.bytes), f"{perplexity(found, texts):.4f}",
                f"{perplexity(found, texts) / exact - 1:+.2%}", f"{report.mean_kl:.2e}", f"{report.top1_agreement:.1%}",
                f"{_kl(middle, alone):.1e}", f"{_kl(alone, decoded(engine, texts, batch=True)):.1e}",
            )
    stdout.print(f"{len(texts or [])} windows of {WINDOW} tokens")
    show_tables(table)


if __name__ == "__main__":
    main()
