"""Quality over bits per weight of the whole file, beside llama.cpp's quantisations of the same weights.

    python -m benchmarks.bits CHECKPOINT WORK [--llama-build DIRECTORY] [--bits 5 5.9 6.6] [--windows 2]
                              [--plot docs/pictures/bits.png]

Ours are bundles of target cpu, measured through ``Engine`` as they compute, 8-bit activations included. llama.cpp's
files come from its own ``llama-quantize``; their weights are read back into floats and run in torch, so that its
kernels and its activations in 8 bits cost it nothing here. Its importance matrix is what its ``llama-imatrix`` would
sum up, squares of inputs: the diagonals of our Hessians of the same text (it cannot run every model of Llama 4's form
itself). Bits are those of the whole file, embedding and norms included, per parameter of the checkpoint.

Three texts that nothing was fitted on, or the first windows of each (``--windows``). Every row is written to
``WORK/rows.jsonl`` when it is done: a run that was stopped goes on there, and ``--plot`` alone draws what is there.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from rich.console import Console
from rich.table import Table
from torch import Tensor

from herdgraph.calibration.calibrate import calibrate
from herdgraph.calibration.matmul_backends import Exact
from herdgraph.calibration.samples import read_samples
from herdgraph.calibration.stream import DecoderStream, Run, States
from herdgraph.calibration.windows import data_of
from herdgraph.console import run_cli, stderr
from herdgraph.export.pipeline import build_bundle
from herdgraph.model.checkpoint import Checkpoint, open_checkpoint
from herdgraph.model.config import HerdConfig
from herdgraph.model.config.parameter_counts import model_size
from herdgraph.model.processing import PromptProcessor
from herdgraph.model.quantization.calibration_file import CalibrationFile
from herdgraph.model.quantization.recipes import hessian_name, needs_hessian
from herdgraph.runtimes import Engine

from .figures import dots
from .gguf_export import entries, write

DATA = Path(__file__).parent / "data"
TEXTS = ("alice", "jargon", "python")
WINDOW = 512
THEIRS = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q4_0")


class Quality(NamedTuple):
    """Of one model on one text: KL against float32 in nats per token, and both perplexities."""

    kl: float
    perplexity: float
    exact_perplexity: float


class Overlaid:
    """A checkpoint some of whose tensors are others; a ``TensorReader``."""

    def __init__(self, source: Checkpoint, tensors: dict[str, Tensor]) -> None:
        self.source, self.tensors = source, tensors
        self.config: HerdConfig = source.config

    def read(self, name: str, index: int | slice | None = None) -> Tensor:
        """A tensor, or one slice of its first axis."""
        if name not in self.tensors:
            return self.source.read(name, index)
        return self.tensors[name] if index is None else self.tensors[name][index]


class Reference:
    """The model in float32: hidden states of all windows, whose logits are found again when they are compared."""

    def __init__(self, checkpoint: Checkpoint, most: int | None = None) -> None:
        tokenizer = PromptProcessor(checkpoint.directory, checkpoint.config).tokenizer
        self.windows: list[tuple[str, list[int]]] = []
        for text in TEXTS:
            ids = tokenizer.encode((DATA / f"{text}.txt").read_text(encoding="utf-8"))
            starts = range(0, len(ids) - WINDOW + 1, WINDOW)[:most]
            self.windows += [(text, ids[first : first + WINDOW]) for first in starts]
        self.exact = list(logits_of(checkpoint, [ids for _, ids in self.windows], lazily=True))

    def compare(self, found: Iterator[Tensor]) -> dict[str, Quality]:
        """Quality by text, and of all together, from log-probabilities [T, V] window by window."""
        sums: dict[str, Tensor] = {}
        for (text, ids), exact, logits_TV in zip(self.windows, self.exact, found, strict=True):
            row = _sums(exact(), logits_TV.log_softmax(-1), torch.tensor(ids))
            for name in (text, "all"):
                sums[name] = sums.get(name, torch.zeros(5, dtype=torch.float64)) + row
        return {name: Quality(float(kl / tokens), math.exp(float(loss / counted)), math.exp(float(exact / counted)))
                for name, (kl, loss, exact, tokens, counted) in sums.items()}


def _sums(exact_TV: Tensor, found_TV: Tensor, ids_T: Tensor) -> Tensor:
    """KL, negative log-likelihoods of the variant and of the exact model, tokens, and tokens that have a successor."""
    kl = (exact_TV.exp() * (exact_TV - found_TV)).sum(dtype=torch.float64)
    losses = [-rows[:-1].gather(1, ids_T[1:, None]).sum(dtype=torch.float64) for rows in (found_TV, exact_TV)]
    return torch.stack([kl, *losses, torch.tensor(float(len(ids_T))), torch.tensor(float(len(ids_T) - 1))])


def logits_of(source: Any, windows: list[list[int]], *, lazily: bool = False) -> Iterator[Any]:
    """Log-probabilities [T, V] of each window by the torch model, or functions that give them."""
    with torch.inference_mode():
        stream = DecoderStream(source)
        states = States(stream.embed(windows, [None] * len(windows)), [len(ids) for ids in windows])
        for index in range(source.config.text.num_layers):
            with stream.layer(index) as layer:
                stream.attend(layer, [Run(states, Exact())])
                stream.feed_forward(index, layer, [Run(states, Exact())])
        for rows in states.windows():
            yield (lambda rows=rows: _head(source, states.x_ND[rows])) if lazily else _head(source, states.x_ND[rows])


def _head(source: Any, x_TD: Tensor) -> Tensor:
    with torch.inference_mode(), DecoderStream(source).head() as head:
        return head(x_TD, Exact()).log_softmax(-1)


def ours(bundle: Path, windows: list[list[int]]) -> Iterator[Tensor]:
    """Logits [T, V] of each window by a bundle."""
    engine = Engine.load(bundle, verify=False)
    for ids in windows:
        yield torch.from_numpy(engine.prefill(engine.new_sequence(), ids, all_positions=True))


def theirs(checkpoint: Checkpoint, path: Path) -> Overlaid:
    """The checkpoint with the weights that a GGUF file holds, turned back into floats."""
    stored = {tensor.name.removesuffix(".weight"): tensor for tensor in gguf.GGUFReader(path).tensors}
    tensors: dict[str, Tensor] = {}
    for entry in entries(checkpoint, Kind.F32):
        tensor = stored[entry.name]
        values = torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))
        if entry.columns is not None:
            shape = checkpoint.tensors[entry.ours].shape
            tensors.setdefault(entry.ours, torch.empty(shape))[..., entry.columns] = values.reshape(entry.shape).mT
        elif entry.ours:
            tensors[entry.ours] = values.reshape(entry.shape)
    return Overlaid(checkpoint, tensors)


def their_files(checkpoint: Checkpoint, work: Path, programs: Path) -> Iterator[tuple[str, Path]]:
    """GGUF files by kind, made when they are asked for."""
    exact, matrix = work / "exact.gguf", work / "imatrix.gguf"
    if not exact.exists():
        write(checkpoint, exact, Kind.F32)
    if not matrix.exists():
        write_importance(checkpoint, calibration_of(checkpoint, work), matrix)
    for kind in THEIRS:
        path = work / f"{kind}.gguf"
        if not path.exists():
            _call(programs / "llama-quantize", "--imatrix", matrix, exact, path, kind, 2)
        yield kind, path


def write_importance(checkpoint: Checkpoint, calibration: Path, path: Path) -> None:
    """Mean squares of the inputs of every matrix whose Hessian was measured, as ``llama-imatrix`` writes them."""
    measured = CalibrationFile.open(calibration, checkpoint.fingerprint())
    measured = replace(measured, source=checkpoint)
    writer = gguf.GGUFWriter(path, "", use_temp_file=False)
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", ["calibration"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", WINDOW)
    for entry in entries(checkpoint, Kind.F32):
        hessian = measured.hessian(entry.ours) if needs_hessian(hessian_name(entry.ours)) else None
        if hessian is not None:
            squares = hessian.diagonal(dim1=-2, dim2=-1).reshape(-1, hessian.shape[-1])
            writer.add_tensor(f"{entry.name}.weight.in_sum2", squares.contiguous().numpy())
            writer.add_tensor(f"{entry.name}.weight.counts", np.ones((len(squares), 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _call(program: Path, *arguments: Any) -> None:
    subprocess.run([program, *map(str, arguments)], check=True, capture_output=True)


def calibration_of(checkpoint: Checkpoint, work: Path) -> Path:
    """The calibration, made when it is asked for; nothing of it is held out."""
    path = work / "calibration"
    if not path.exists():
        calibrate(checkpoint, path, data_of(checkpoint, read_samples([], images=False), held_out=0))
    return path


def our_bundles(checkpoint: Checkpoint, work: Path, bits: list[float]) -> Iterator[tuple[str, Path]]:
    """Bundles by name, made when they are asked for."""
    calibration = calibration_of(checkpoint, work)
    wanted: list[tuple[str, dict[str, Any]]] = [("int8", {"recipe": "int8"}), ("int4", {"recipe": "int4"})]
    wanted += [(f"int4 --bits {target:g}", {"recipe": "int4", "bits": target}) for target in bits]
    for name, options in wanted:
        path = work / name.replace(" --", "-").replace(" ", "-")
        if not path.exists():
            build_bundle(checkpoint, path, calibration=calibration, **options)
        yield name, path


def measure(
    checkpoint: Checkpoint, work: Path, programs: Path | None, bits: list[float], most: int | None = None
) -> None:
    """Add the rows that are missing."""
    rows = work / "rows.jsonl"
    done = {row["name"] for row in read(rows)}
    parameters = model_size(checkpoint.config).total
    reference = Reference(checkpoint, most)
    windows = [ids for _, ids in reference.windows]

    def add(name: str, kind: str, path: Path, found: Iterator[Tensor]) -> None:
        size = sum(file.stat().st_size for file in path.glob("*.data")) if path.is_dir() else path.stat().st_size
        quality = {text: each._asdict() for text, each in reference.compare(found).items()}
        with rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"name": name, "kind": kind, "bits": 8 * size / parameters, **quality}) + "\n")

    for name, path in our_bundles(checkpoint, work, bits):
        if name not in done:
            stderr.print(f"[dim]measuring {name}[/dim]")
            add(name, "herdgraph", path, ours(path, windows))
    for name, path in their_files(checkpoint, work, programs) if programs else ():
        if name not in done:
            stderr.print(f"[dim]measuring {name}[/dim]")
            add(name, "llama.cpp", path, logits_of(theirs(checkpoint, path), windows))


def read(rows: Path) -> list[dict[str, Any]]:
    """Finished rows."""
    lines = rows.read_text(encoding="utf-8").splitlines() if rows.exists() else []
    return sorted((json.loads(line) for line in lines), key=lambda row: (row["kind"], -row["bits"]))


def show(rows: list[dict[str, Any]]) -> None:
    """Print all rows, by text and all together."""
    table = Table("", "bits per weight", *(f"KL {text}" for text in (*TEXTS, "all")), "perplexity, change")
    for row in rows:
        quality = Quality(**row["all"])
        table.add_row(row["name"], f"{row['bits']:.2f}", *(f"{row[text]['kl']:.2e}" for text in (*TEXTS, "all")),
                      f"{quality.perplexity:.3f}, {quality.perplexity / quality.exact_perplexity - 1:+.2%}")
    Console(width=120).print(table)


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """KL over bits: a line for the sizes of ``--bits`` and int8, one for llama.cpp's, and recipe int4 by itself."""
    lines: dict[str, list[tuple[float, float, str]]] = {"herdgraph": [], "llama.cpp": [], "herdgraph --recipe int4": []}
    for row in rows:
        kind = "herdgraph --recipe int4" if row["name"].split(",")[0] == "int4" else row["kind"]
        lines[kind].append((row["bits"], row["all"]["kl"], row["name"].removeprefix("int4 ")))
    dots(path, "What bits buy: SmolLM2 in Llama 4 form", "bits per weight, whole file", "KL, nats per token", lines)


def main() -> None:
    """Parse the command line, measure and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--llama-build", type=Path, help="directory with llama-quantize")
    parser.add_argument("--bits", type=float, nargs="*", default=[5, 5.9, 6.6])
    parser.add_argument("--windows", type=int, help="of 512 tokens, of each text; all of them unless given")
    parser.add_argument("--plot", type=Path, help="draw what has been measured, and measure nothing")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.plot is None:
        with open_checkpoint(args.checkpoint) as checkpoint:
            measure(checkpoint, args.work, args.llama_build, args.bits, args.windows)
    rows = read(args.work / "rows.jsonl")
    show(rows)
    if args.plot is not None:
        draw(args.plot, rows)


if __name__ == "__main__":
    run_cli(main)
