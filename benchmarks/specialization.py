"""Which way of upcycling makes experts differ: a small dense model becomes mixtures, and all go on learning alike.

    python -m benchmarks.specialization WORK --tokenizer DIR --data FILE ... [--steps 300] [--more 300] [--seeds 0]
        [--only NAME ...]

A dense Llama learns for ``--steps``. Then it learns on, and so do mixtures of four experts that were made of it, for
``--more`` steps on the same batches:

* copies: split mode, every expert is a copy of half of the feed-forward;
* drop 0.5: the same, half of the neurons of every expert drawn anew (Drop-Upcycling, arXiv 2502.19261);
* shared: the whole feed-forward is shared, routed experts are random and silent at first. A token's feed-forward costs
  twice as much.

Measured on held-out text: loss; loss with every token's expert exchanged for the next one, and what that costs as a
share of the gain over the dense model; the mutual information between a token's class and its expert, of the entropy of
the class; the largest and smallest load of an expert.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from herdgraph.console import stderr, stdout
from herdgraph.model.checkpoint import Checkpoint, open_checkpoint, save_checkpoint
from herdgraph.model.checkpoint.base import PROCESSOR_FILES
from herdgraph.model.config import HerdConfig, TextConfig, read_config, to_hf
from herdgraph.model.llama4.decoder import Experts
from herdgraph.model.training.data import Batch
from herdgraph.model.training.moe.experts import ExpertOptions
from herdgraph.model.training.objective import held_out_loss, logits_of
from herdgraph.model.training.optim import OptimizerOptions
from herdgraph.model.training.parallel.ranks import Ranks
from herdgraph.model.training.runs import PretrainOptions, pretrain
from herdgraph.model.training.runs.run import RunOptions, loaders
from herdgraph.model.training.runs.start import open_model
from herdgraph.model.training.train_options import TrainOptions
from herdgraph.model.upcycle import DenseModel
from herdgraph.model.upcycle.convert import target_config, upcycled_tensors

from .experts import counts_by_class, exchange, mutual_information, token_classes, with_hooks

DENSE = "dense"
WAYS: Mapping[str, Mapping[str, Any]] = {
    "copies": {"mode": "split"}, "drop 0.5": {"mode": "split", "drop": 0.5}, "shared": {"mode": "shared"}}


@dataclass(frozen=True)
class HerdTensors:
    """A dense herd member's tensors under the names of ``model/upcycle/dense.py``."""

    checkpoint: Checkpoint

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """See ``TensorSource``."""
        return {name.replace("feed_forward", "mlp"): info.shape for name, info in self.checkpoint.tensors.items()}

    def read(self, name: str) -> Tensor:
        """See ``TensorSource``."""
        return self.checkpoint.read(name.replace("mlp", "feed_forward")).float()


def processor_files(directory: Path) -> dict[str, Path]:
    """Tokenizer and what belongs to it."""
    return {name: directory / name for name in PROCESSOR_FILES if (directory / name).is_file()}


def dense_files(args: argparse.Namespace) -> Path:
    """A directory with the dense model's configuration and the tokenizer."""
    directory, teacher = args.work / "start", read_config(args.tokenizer).text
    directory.mkdir(parents=True, exist_ok=True)
    for name, path in processor_files(args.tokenizer).items():
        shutil.copyfile(path, directory / name)
    every, none = (True,) * args.layers, (False,) * args.layers
    text = TextConfig(
        vocab_size=teacher.vocab_size, hidden_size=args.width, num_layers=args.layers, num_heads=args.width // 32,
        num_kv_heads=args.width // 64, head_dim=32, expert_size=3 * args.width, dense_size=3 * args.width,
        rope_layers=every, chunked_layers=none, rope_theta=10000.0, tie_word_embeddings=True,
        max_position_embeddings=2048, bos_token_id=teacher.bos_token_id, eos_token_ids=teacher.eos_token_ids,
        pad_token_id=teacher.pad_token_id)
    (directory / "config.json").write_text(json.dumps(to_hf(HerdConfig(text=text))), encoding="utf-8")
    return directory


def mixture_of(dense: Path, output: Path, way: Mapping[str, Any], seed: int) -> Path:
    """Upcycle a dense herd member to four experts."""
    with open_checkpoint(dense) as checkpoint:
        text = checkpoint.config.text
        model = DenseModel(
            vocab_size=text.vocab_size, hidden_size=text.hidden_size, num_layers=text.num_layers,
            num_heads=text.num_heads, num_kv_heads=text.num_kv_heads, head_dim=text.head_dim, ffn_size=text.dense_size,
            rope_theta=text.rope_theta, rope_scaling=None, rms_norm_eps=text.rms_norm_eps, tied=True,
            context=text.max_position_embeddings, bos_token_id=text.bos_token_id, eos_token_ids=text.eos_token_ids,
            pad_token_id=text.pad_token_id, tensors=HerdTensors(checkpoint))
        config = target_config(model, experts=4, mode=way["mode"])
        tensors = upcycled_tensors(model, config, seed=seed, sharpness=10.0, dtype=torch.float32, **way)
        save_checkpoint(output, config, tensors, processor_files=processor_files(dense), overwrite=True)
    return output


def trained(checkpoint: Path, output: Path, seed: int, steps: int, args: argparse.Namespace, *, fresh: bool) -> Path:
    """Train, or go on where a run was cut off."""
    stderr.print(f"training: {output}")
    options = replace(options_of(args), output=output, checkpoint=checkpoint, fresh=fresh)
    pretrain(replace(options, train=replace(options.train, steps=steps, seed=seed)))
    return output / "model"


def options_of(args: argparse.Namespace) -> PretrainOptions:
    """What all runs share."""
    return PretrainOptions(
        checkpoint=args.work, output=args.work, data=tuple(args.data), rows=args.rows, seq_len=args.length,
        held_out=0.05, held_out_batches=24, train=TrainOptions(save_minutes=2),
        optimizer=OptimizerOptions(learning_rate=args.rate, warmup=20, schedule="wsd"),
        experts=ExpertOptions(bias_rate=0, balance_loss=args.balance))


@dataclass
class Evaluation:
    """Figures of a model on held-out text; those of experts are None without any.

    Attributes:
        loss: nats per token.
        exchanged: the same with each token's expert exchanged for the next.
        information: between class and expert, of the entropy of the class, mean over layers.
        loads: largest and smallest share of an expert, means over layers.
    """

    loss: float
    exchanged: float | None = None
    information: float | None = None
    loads: tuple[float, float] | None = None


def evaluate(checkpoint: Path, batches: list[Batch]) -> Evaluation:
    """Measure a model."""
    model = open_model(checkpoint).eval()
    layers = [module for module in model.modules() if isinstance(module, Experts)]
    if not layers:
        return Evaluation(held_out_loss(model, batches))
    counts_LCE = counts_by_class(layers, token_classes(checkpoint), batches, lambda batch: logits_of(model, batch))
    load_LE = counts_LCE.sum(1) / counts_LCE.sum((1, 2))[:, None]
    return Evaluation(
        held_out_loss(model, batches), with_hooks(layers, exchange, lambda: held_out_loss(model, batches)),
        statistics.mean(mutual_information(counts_CE) for counts_CE in counts_LCE),
        (float(load_LE.amax(1).mean()), float(load_LE.amin(1).mean())))


def report(found: dict[str, list[Evaluation]], args: argparse.Namespace) -> Table:
    """Means over seeds."""
    table = Table("", "held-out loss", "experts exchanged", "of the gain over dense", "class known by expert",
                  "largest, smallest load", title=f"{args.more} more steps of {args.rows * args.length} tokens, width "
                  f"{args.width}, {args.layers} layers, {len(args.seeds)} seed(s)")
    dense = statistics.mean(one.loss for one in found[DENSE])
    for name, several in found.items():
        loss = statistics.mean(one.loss for one in several)
        if several[0].exchanged is None:
            table.add_row(name, f"{loss:.3f}")
            continue
        exchanged, information = (statistics.mean(getattr(one, key) for one in several)
                                  for key in ("exchanged", "information"))
        loads = (statistics.mean(one.loads[at] for one in several if one.loads) for at in (0, 1))
        share = f"{(exchanged - loss) / (dense - loss):.0%}" if loss < dense else "no gain"
        table.add_row(name, f"{loss:.3f}", f"{exchanged:.3f}", share, f"{information:.0%}",
                      ", ".join(f"{load:.0%}" for load in loads))
    return table


def measured(name: str, seed: int, args: argparse.Namespace) -> Evaluation:
    """A model that has learned on, from the disk where it was measured before."""
    result = args.work / f"{name.replace(' ', '-')}-{seed}" / "result.json"
    if not result.exists():
        dense = args.work / f"first-{seed}"
        checkpoint = trained(dense_files(args), dense, seed, args.steps, args, fresh=True)
        if name != DENSE:
            checkpoint = mixture_of(checkpoint, args.work / f"{name.replace(' ', '-')}-{seed}-start", WAYS[name], seed)
        model = trained(checkpoint, result.parent, seed, args.more, args, fresh=False)
        options = RunOptions(**{key: getattr(options_of(args), key) for key in (
            "data", "output", "rows", "seq_len", "held_out", "held_out_batches")})
        _, batches = loaders(options, read_config(model), model, Ranks.alone())
        result.write_text(json.dumps(vars(evaluate(model, batches))), encoding="utf-8")
    return Evaluation(**json.loads(result.read_text(encoding="utf-8")))


def main() -> None:
    """Parse the command line, run what is missing, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="checkpoint whose tokenizer is used")
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    for name, default in (("width", 128), ("layers", 4), ("steps", 300), ("more", 300), ("rows", 2), ("length", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--balance", type=float, default=0.01, help="factor of the load-balancing loss")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", choices=[DENSE, *WAYS], default=[DENSE, *WAYS])
    args = parser.parse_args()
    stdout.print(report({name: [measured(name, seed, args) for seed in args.seeds] for name in args.only}, args))


if __name__ == "__main__":
    main()
