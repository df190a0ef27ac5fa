"""How fast a bundle is here, and its roofline utilization: the rate over what the machine's peaks would allow.

Utilization compares a rate with a peak measured in the same run (``peaks.py``, of a GPU ``gpu_peaks.py``):

* decode, of read bandwidth: every token reads the weights it uses and the visible keys and values once;
      bytes = the manifest's active_bytes + 2 · layers · kv_heads · head_dim · visible · element size
* prefill, of the GEMM rate in fp32, of a GPU in bf16: 2 operations per weight and token (the head runs on one token
  only), and 4 · heads · head_dim · visible for attention.

Tokens are random: routing and timing do not depend on their meaning.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import HerdError
from ...model.config import HerdConfig, TextConfig
from ...model.config.parameter_counts import model_size
from ..bundle.manifest import Bundle
from ..engine import Engine
from ..executors.options import Memory
from ..executors.ort.cuda.session import PROVIDER, place_of
from ..kv_cache.sequence import Sequence
from .gpu_peaks import GpuPeaks, measure_gpu_peaks
from .peaks import HardwarePeaks, measure_peaks


@dataclass(frozen=True)
class Spread:
    """A rate per second over repetitions."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, work: float, seconds: list[float]) -> Spread:
        """Rates of equal amounts of work that took these times."""
        rates = [work / duration for duration in seconds]
        return cls(statistics.median(rates), min(rates), max(rates))


@dataclass(frozen=True)
class BenchReport:
    """What was measured.

    Attributes:
        load_seconds: opening, checking and loading the bundle.
        first_token_seconds: from the prompt's tokens to the first logits, median.
        prefill: tokens per second.
        prefill_utilization: of the peak GEMM rate (model FLOP utilization, MFU).
        decode: tokens per second at the context.
        decode_utilization: of the peak read bandwidth (model bandwidth utilization, MBU).
        batch: sequences decoded together.
        batch_decode: tokens per second of all of them; None for a batch of one.
        peak_bytes: largest resident memory of this process, which is rank 0 of a sharded bundle; the peaks are
            measured afterwards.
        peaks: what the machine can do at most.
    """

    prompt_tokens: int
    new_tokens: int
    context: int
    repeats: int
    load_seconds: float
    first_token_seconds: float
    prefill: Spread
    prefill_utilization: float
    decode: Spread
    decode_utilization: float
    batch: int
    batch_decode: Spread | None
    peak_bytes: int
    peaks: HardwarePeaks | GpuPeaks

    def to_json(self) -> dict[str, Any]:
        """Plain dictionary."""
        return asdict(self)


def bench(
    bundle: Path, *, prompt: int = 512, new: int = 32, context: int | None = None, batch: int = 1,
    repeats: int = 3, threads: int | None = None, memory: Memory = "fast", device: str | None = None,
) -> BenchReport:
    """Measure a bundle in this process.

    Args:
        bundle: directory.
        prompt: tokens of the prompt.
        new: tokens decoded one by one.
        context: tokens before the decoded ones; None for the prompt's.
        batch: sequences, all at this context, that are decoded together besides.
        repeats: repetitions; medians are reported.
        threads: as for ``Engine.load``.
        memory: as for ``Engine.load``.
        device: as for ``Engine.load``.

    Raises:
        HerdError: an impossible length, or the bundle cannot be loaded.
    """
    context = prompt if context is None else context
    for name, value in (("prompt", prompt), ("new", new), ("context", context), ("batch", batch),
                        ("repeats", repeats)):
        if value < 1:
            raise HerdError(f"{name} is {value}, it must be at least 1")
    started = time.perf_counter()
    engine = Engine.load(bundle, threads=threads, memory=memory, device=device)
    loaded = time.perf_counter() - started
    engine.wait_until_resident()
    prefills = [_prefill(engine, prompt, seed)[1] for seed in range(repeats + 1)][1:]
    sequence, _ = _prefill(engine, context, seed=0)
    decodes = [_decode(engine, [sequence], new) for _ in range(repeats)]
    together = [sequence, *(sequence.fork() for _ in range(batch - 1))]
    batches = [_decode(engine, together, new) for _ in range(repeats)] if batch > 1 else []
    peak_bytes = _peak_bytes()
    engine.close()
    peaks = _peaks(engine.bundle, threads, device)
    prefill, decode = Spread.of(prompt, prefills), Spread.of(new, decodes)
    keys_and_values = kv_bytes(engine.config.text, context, sequence.cache.element_bytes)
    bytes_per_token = engine.bundle.manifest.active_bytes + keys_and_values
    return BenchReport(
        prompt_tokens=prompt, new_tokens=new, context=context, repeats=repeats, load_seconds=loaded,
        first_token_seconds=statistics.median(prefills), prefill=prefill,
        prefill_utilization=prefill.median * prefill_operations(engine.config, prompt) / peaks.float_gemm,
        decode=decode,
        decode_utilization=decode.median * bytes_per_token / peaks.read_bandwidth,
        batch=batch, batch_decode=Spread.of(batch * new, batches) if batches else None,
        peak_bytes=peak_bytes, peaks=peaks,
    )


def _peaks(bundle: Bundle, threads: int | None, device: str | None) -> HardwarePeaks | GpuPeaks:
    """Of what the bundle runs on: this machine's CPU, a GPU, or the GPUs of the ranks that work at the same time."""
    if bundle.manifest.provider != PROVIDER:
        return measure_peaks(threads)
    shards = bundle.manifest.shards
    return measure_gpu_peaks(place_of(device), shards.plan.width if shards else 1)


def kv_bytes(text: TextConfig, context: int, element: float = 4) -> float:
    """Bytes of keys and values, of ``element`` bytes each, that one token reads after ``context`` tokens."""
    visible = sum(_visible(text, layer, context) for layer in range(text.num_layers))
    return 2 * text.num_kv_heads * text.head_dim * element * visible


def prefill_operations(config: HerdConfig, tokens: int) -> float:
    """Operations per token of a prompt: products with weights, and attention to the tokens before."""
    text = config.text
    vocabulary = text.vocab_size * text.hidden_size * (1 if text.tie_word_embeddings else 2)
    visible = sum(
        _visible(text, layer, position) for layer in range(text.num_layers) for position in range(tokens)
    ) / tokens
    return 2 * (model_size(config).active - vocabulary) + 4 * text.num_heads * text.head_dim * visible


def _visible(text: TextConfig, layer: int, position: int) -> int:
    """Keys that the token at a position sees, its own included."""
    chunk = text.chunk_of(layer)
    return (position % chunk if chunk else position) + 1


def _prefill(engine: Engine, tokens: int, seed: int) -> tuple[Sequence, float]:
    ids = np.random.default_rng(seed).integers(0, engine.config.text.vocab_size, tokens)
    if engine.config.vision:
        ids[ids == engine.config.image_token_id] = 0
    sequence = engine.new_sequence()
    started = time.perf_counter()
    engine.prefill(sequence, ids.tolist())
    return sequence, time.perf_counter() - started


def _decode(engine: Engine, sequences: list[Sequence], tokens: int) -> float:
    """Decode, then take the tokens back, so that every repetition has the same context."""
    length, alone = len(sequences[0]), len(sequences) == 1
    ids = np.random.default_rng(length).integers(0, engine.config.text.vocab_size, (tokens + 1, len(sequences)))
    if engine.config.vision:
        ids[ids == engine.config.image_token_id] = 0
    steps = ids.tolist()

    def step(row: list[int]) -> None:
        if alone:
            engine.decode(sequences[0], row[0])
        else:
            engine.decode_batch(sequences, row)

    step(steps[0])  # grows buffers and binds once, outside of the time
    started = time.perf_counter()
    for row in steps[1:]:
        step(row)
    seconds = time.perf_counter() - started
    for sequence in sequences:
        engine.truncate(sequence, length)
    return seconds


def _peak_bytes() -> int:
    """Largest resident memory so far (Linux; 0 elsewhere)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    lines = status.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
