"""A dense model becomes a mixture of experts and learns from its former self: what distillation repairs and changes.

    python -m benchmarks.upcycle_distil [GGUF] [--steps 60] [--threads 1] [--plot FILE]

SmolLM2-135M (``make demo`` fetches it) is upcycled to 4 experts per layer, with routers soft enough to learn, and
distilled from the dense original on pages of Python's documentation and the Jargon File; a tenth of the pages is held
out. Before and after, on held-out pages in float32:

* KL(dense || mixture), nats per token;
* the same with every token's expert exchanged for the next one: no difference while experts are copies, the more the
  more they have become different;
* what an expert tells of its token's class (begins a word, goes on in one, number, blank, sign): mutual information, as
  a share of the entropy of the class;
* load: share of a layer's tokens that its experts get.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from herdgraph.calibration.samples import DEFAULT_TEXT
from herdgraph.console import stderr, stdout
from herdgraph.model.llama4.decoder import Experts
from herdgraph.model.llama4.model import Llama4
from herdgraph.model.processing import PromptProcessor
from herdgraph.model.training.data import IGNORED, Batch
from herdgraph.model.training.moe.experts import ExpertOptions
from herdgraph.model.training.optim import OptimizerOptions
from herdgraph.model.training.runs import UpcycleOptions, upcycle_then_distil
from herdgraph.model.training.runs.start import open_model
from herdgraph.model.training.train_options import TrainOptions

from .experts import counts_by_class, exchange, mutual_information, token_classes, with_hooks
from .figures import before_and_after

PAGE = 1200


@dataclass
class Evaluation:
    """Figures of a mixture on held-out pages.

    Attributes:
        kl: to the dense model.
        exchanged_kl: with each token's expert exchanged for the next.
        information: what experts tell of classes, mean over layers.
        load_LE: share of tokens by layer and expert.
    """

    kl: float
    exchanged_kl: float
    information: float
    load_LE: Tensor


def pages() -> tuple[list[str], list[str]]:
    """Pages to train and to evaluate on."""
    from pydoc_data.topics import topics

    text = "\n".join([DEFAULT_TEXT.read_text(encoding="utf-8"), *(topics[name] for name in sorted(topics))])
    found = [page[0].strip() for page in re.finditer(rf"(?s).{{{PAGE}}}\S*\s*", text)]
    random.Random(0).shuffle(found)
    held_out = len(found) // 10
    return found[held_out:], found[:held_out]


def logits_of(model: Llama4, ids_T: list[int]) -> Tensor:
    """Log-probabilities of one page, [T, V]."""
    return model(torch.tensor([ids_T]), None, None)[0].log_softmax(-1)


@torch.no_grad()
def evaluate(dense: Llama4, mixture: Llama4, encoded: list[list[int]], classes_V: Tensor) -> Evaluation:
    """Compare a mixture with the dense model."""
    layers = [module for module in mixture.modules() if isinstance(module, Experts)]
    own, exchanged = 0.0, 0.0
    for ids_T in encoded:
        reference_TV = logits_of(dense, ids_T)
        own += kl(reference_TV, logits_of(mixture, ids_T))
        exchanged += kl(reference_TV, with_hooks(layers, exchange, lambda ids_T=ids_T: logits_of(mixture, ids_T)))
    rows = [torch.tensor([ids_T]) for ids_T in encoded]
    batches = [Batch(row, torch.full_like(row, IGNORED), torch.zeros_like(row)) for row in rows]
    counts_LCE = counts_by_class(layers, classes_V, batches, lambda batch: mixture(batch.input_ids_BT, None, None))
    load_LE, tokens = counts_LCE.sum(1), sum(map(len, encoded))
    return Evaluation(own / tokens, exchanged / tokens, statistics.mean(map(mutual_information, counts_LCE)),
                      load_LE / load_LE.sum(1, keepdim=True))


def kl(reference_TV: Tensor, found_TV: Tensor) -> float:
    """KL divergence summed over tokens."""
    return float((reference_TV.exp() * (reference_TV - found_TV)).sum())


def train(gguf: Path, output: Path, train_pages: list[str], steps: int) -> None:
    """Upcycle and distil; continues a run that was cut off."""
    output.mkdir(parents=True, exist_ok=True)
    data = output / "pages.jsonl"
    data.write_text("\n".join(json.dumps({"text": page}) for page in train_pages), encoding="utf-8")
    options = UpcycleOptions(
        checkpoint=gguf, output=output, data=(data,), rows=2, seq_len=256, held_out=0.0,
        train=TrainOptions(steps=steps, precision="fp32", save_every=25, log_every=5),
        optimizer=OptimizerOptions(learning_rate=2e-5, warmup=10, weight_decay=0.01),
        experts=ExpertOptions(bias_rate=0, balance_loss=0.001), weighting="fixed", soft=1.0,
    )
    with Progress() as progress:
        task = progress.add_task("upcycle, then distil", total=steps)

        def on_step(done, record) -> None:
            progress.update(task, completed=done.step, description=f"loss {record['loss']:.4f}")

        upcycle_then_distil(options, on_step)


def main() -> None:
    """Parse the command line, train, evaluate, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path, nargs="?", default=Path(".cache/demo/SmolLM2-135M-Instruct.gguf"))
    parser.add_argument("--output", type=Path, default=Path(".cache/upcycle-distil"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--pages", type=int, default=20, help="held-out pages to evaluate on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train_pages, held_out = pages()
    train(args.gguf, args.output, train_pages, args.steps)
    stderr.print(f"evaluating on {args.pages} held-out pages")
    processor = PromptProcessor(args.output / "dense", open_model(args.output / "dense").config)
    encoded = [processor.tokenizer.encode(page)[:256] for page in held_out[: args.pages]]
    dense = open_model(args.output / "dense")
    classes_V = token_classes(args.output / "dense")
    found = {name: evaluate(dense, open_model(args.output / part), encoded, classes_V)
             for name, part in (("before", "upcycled"), ("after", "model"))}
    table = Table(title=f"{args.steps} steps of 512 tokens, held out {sum(map(len, encoded))} tokens")
    for column in ("", "KL to dense", "KL, experts exchanged", "class known by expert", "largest load",
                   "smallest load"):
        table.add_column(column)
    for name, each in found.items():
        table.add_row(name, f"{each.kl:.2e}", f"{each.exchanged_kl:.2e}", f"{each.information:.0%}",
                      f"{float(each.load_LE.amax(1).mean()):.3f}", f"{float(each.load_LE.amin(1).mean()):.3f}")
    stdout.print(table)
    if args.plot:
        load = {name: each.load_LE.numpy() for name, each in found.items()}
        title = f"{args.gguf.stem} as {load['after'].shape[1]} experts, {args.steps} steps of distillation"
        before_and_after(args.plot, title, "expert", "layer", "share of a layer's tokens", **load)


if __name__ == "__main__":
    main()
