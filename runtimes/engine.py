"""The engine: what applications embed.

>>> engine = Engine.load("bundle")
>>> print(engine.generate("Once upon a time", max_new_tokens=32).text)
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Items
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from ..errors import HerdError
from ..model.config import HerdConfig
from ..model.processing import PromptProcessor
from .bundle.manifest import Bundle
from .distributed.collectives import TIMEOUT
from .distributed.front_end import load_sharded
from .distributed.launch import ShardOptions, check_devices, threads_of
from .executors.load import Runners, load_executor
from .executors.options import ExecutorOptions
from .executors.ort.load import load_vision
from .executors.runner import Logits, Runner
from .executors.vision import VisionRunner
from .generation import Generation, Sampling, StopRule, TextStream, shared_prefix
from .kv_cache.sequence import Sequence

MOST_THREADS = 1024
"""More cores than a machine has; ONNX Runtime would start as many threads as it is told."""

Memory = Literal["fast", "low"]
"""``fast``: weights packed for speed; ``low``: weights used as they are mapped. See ``Engine.load``."""

Prompt = str | list[dict[str, Any]]
"""A raw completion, or chat messages with roles and contents (see ``model.processing.prompt``)."""


class Engine:
    """A loaded bundle: generates text, or gives logits to those who bring their own loop.

    One engine serves many sequences; one sequence belongs to one thread at a time.
    """

    def __init__(self, bundle: Bundle, decoder: Runner, vision: VisionRunner | None) -> None:
        self.bundle, self._decoder, self._vision = bundle, decoder, vision

    @classmethod
    def load(
        cls, path: str | Path, *, threads: int | None = None, verify: bool = True, memory: Memory = "fast",
        devices: Items[str] | None = None, timeout: float = TIMEOUT,
    ) -> Engine:
        """Open, check and load a bundle.

        Args:
            path: bundle directory.
            threads: threads of one operator on every rank, None for one per core.
            verify: compare every file's SHA-256 with the manifest; weights, which are only numbers, while they load.
            memory: ``fast`` packs all weights for speed, in memory of their own; ``low`` uses them as they lie in the
                bundle, and the operating system reads and drops them page by page: a bundle may be larger than the
                memory, and experts that are never chosen are never read.
            devices: of a sharded bundle, per rank the cores that it may use, such as ``["0-7", "8-15"]``.
            timeout: of a sharded bundle, seconds that a rank may keep the others waiting in the middle of a call.

        A sharded bundle starts its other ranks as processes of this machine; under torchrun it joins them, and only
        rank 0 gets an engine (docs/sharding.md). Close the engine, or use it as a context manager.

        Raises:
            HerdError: the bundle is incomplete, altered, or made for another runtime.
        """
        if threads is not None and not 1 <= threads <= MOST_THREADS:
            raise HerdError(f"threads is {threads}, it must be within 1 and {MOST_THREADS}")
        if memory not in get_args(Memory):
            raise HerdError(f"memory is {memory!r}, it must be one of {', '.join(get_args(Memory))}")
        bundle = Bundle.open(path, verify=False)
        ranks = bundle.manifest.shards.plan.world if bundle.manifest.shards else 1
        places = check_devices(devices, ranks)
        if bundle.manifest.shards:
            options = ShardOptions(threads_of(threads, ranks), verify, memory == "fast", timeout, places)
            vision = ExecutorOptions(threads, memory == "fast")
            engine = cls(bundle, load_sharded(bundle, options), load_vision(bundle, vision))
        else:
            engine = cls(bundle, *_load_verified(bundle, ExecutorOptions(threads, memory == "fast"), verify))
        engine._warm_up()
        return engine

    def _warm_up(self) -> None:
        """Run a token, so that buffers that a first call allocates are there before somebody waits for it."""
        self._step(self.new_sequence(), 0)

    def close(self) -> None:
        """End the other processes of a sharded engine; afterwards it refuses to run."""
        self._decoder.close()

    @property
    def closed(self) -> str:
        """Why it runs no more: it was closed, or a rank failed; empty while it runs."""
        return self._decoder.closed

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def config(self) -> HerdConfig:
        """The model's configuration."""
        return self.bundle.manifest.config

    @cached_property
    def processor(self) -> PromptProcessor:
        """Text and images to tokens and back, from the files the checkpoint brought along."""
        return PromptProcessor(self.bundle.processor, self.config)

    # -- text in, text out ---------------------------------------------------------------------------------------

    def generate(self, prompt: Prompt, **options: Any) -> Generation:
        """Generate to the end. Options as in ``stream``."""
        stream = self.stream(prompt, **options)
        for _ in stream:
            pass
        return stream.result

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 256,
        stop: Iterable[str] = (),
        stop_ids: Iterable[int] | None = None,
        images: Items[Any] | None = None,
        sequence: Sequence | None = None,
        **sampling: Any,
    ) -> TextStream:
        """Generate, and yield text as soon as it is certain.

        Args:
            prompt: a string (raw completion) or chat messages.
            max_new_tokens: length limit; the model's context is another.
            stop: strings that end the text before them.
            stop_ids: tokens that end the text, None for the model's own.
            images: pictures for the ``<|image|>`` placeholders of a string prompt; messages carry their own.
            sequence: continue this one: the prefix that it shares with the prompt is not computed again.
            sampling: fields of ``Sampling``: temperature, top_k, top_p, min_p, repetition_penalty, seed, logprobs.

        Returns:
            An iterator of text deltas with a ``result``.

        Raises:
            HerdError: an impossible prompt or option.
        """
        prepared = self.processor.prepare(prompt, images=images)
        room = self.config.text.max_position_embeddings - len(prepared.token_ids)
        ids = self.processor.tokenizer.stop_ids if stop_ids is None else stop_ids
        rule = StopRule(max_new_tokens, frozenset(ids), tuple(stop))
        sequence = self.new_sequence() if sequence is None else sequence

        def prefill() -> tuple[Logits, int]:
            """Logits after the prompt, and how many of its tokens the sequence held already."""
            shared = shared_prefix(sequence, prepared, self.config)
            self.truncate(sequence, shared)
            pixels = prepared.pixel_values
            fresh = None if pixels is None else pixels[len(sequence.tile_digests) :]
            return self.prefill(sequence, prepared.token_ids[shared:], fresh), shared

        return TextStream(
            prefill,
            lambda token: self._step(sequence, token),
            tokenizer=self.processor.tokenizer,
            prompt_ids=prepared.token_ids,
            sampling=Sampling.of(sampling),
            stop=rule.within(room),
        )

    # -- tokens in, logits out -----------------------------------------------------------------------------------

    def new_sequence(self) -> Sequence:
        """An empty sequence."""
        return self._decoder.new_sequence()

    def prefill(
        self, sequence: Sequence, token_ids: Items[int], pixel_values: np.ndarray[Any, Any] | None = None, *,
        all_positions: bool = False,
    ) -> Logits:
        """Append tokens, and images whose features fill the image-token positions in order.

        Args:
            sequence: grows by the tokens.
            token_ids: at least one.
            pixel_values: float32 [tiles, 3, H, W], normalised, of one or several images.
            all_positions: logits of every token instead of the last one's.

        Returns:
            float32 [vocabulary], or [T, vocabulary].

        Raises:
            HerdError: no tokens, an id outside of the vocabulary, more tokens than the context holds, or images that
                do not match the image tokens.
        """
        token_ids = [int(token) for token in token_ids]
        self._check_tokens(sequence, token_ids)
        tiles = np.zeros(0, np.float32) if pixel_values is None else pixel_values
        self._check_images(token_ids, len(tiles))
        features = np.zeros((0, self.config.text.hidden_size), np.float32)
        if len(tiles) and self._vision is not None:
            features = self._vision.features(tiles)
        logits = self._decoder.prefill(sequence, token_ids, features, all_positions=all_positions)
        if len(tiles):
            sequence.append_images(features, tiles)
        return logits

    def decode(self, sequence: Sequence, token_id: int) -> Logits:
        """Append one text token; returns its logits, float32 [vocabulary]."""
        self._check_images([token_id])
        return self._step(sequence, token_id).copy()

    def _step(self, sequence: Sequence, token_id: int) -> Logits:
        """Append one token, chosen by a caller or by the model itself; its logits are valid until the next call."""
        self._check_tokens(sequence, [token_id])
        return self._decoder.decode(sequence, int(token_id))

    def decode_batch(self, sequences: Items[Sequence], token_ids: Items[int]) -> Logits:
        """Append one text token to each of several sequences, of any lengths, in one call.

        Args:
            sequences: different ones; the same again in the next call costs nothing, others are moved together.
            token_ids: one per sequence.

        Returns:
            float32 [B, vocabulary].

        Raises:
            HerdError: no sequence, one given twice, another number of tokens, or a token that ``decode`` refuses.
        """
        if len(sequences) != len(token_ids) or not sequences:
            raise HerdError(f"{len(sequences)} sequences were given {len(token_ids)} tokens, give one token to each")
        if len({id(sequence) for sequence in sequences}) < len(sequences):
            raise HerdError("a sequence was given twice in one batch: fork it")
        for sequence, token in zip(sequences, token_ids, strict=True):
            self._check_tokens(sequence, [token])
            self._check_images([token])
        return self._decoder.decode_batch(sequences, token_ids).copy()

    def truncate(self, sequence: Sequence, length: int) -> None:
        """Forget all but the first ``length`` tokens.

        Global layers only forget; a chunked layer whose buffer has been reused since is filled again by running the
        tokens of the last chunk.

        Raises:
            HerdError: ``length`` is negative or more than the sequence holds.
        """
        if not 0 <= length <= len(sequence):
            raise HerdError(f"cannot truncate a sequence of {len(sequence)} tokens to {length}")
        self._decoder.truncate(sequence, length)

    # -- checks --------------------------------------------------------------------------------------------------

    def _check_images(self, token_ids: Items[int], tiles: int = 0) -> None:
        """Image tokens have to be as many as the tiles' features."""
        per_tile = self.config.vision.tokens_per_tile if self.config.vision else 0
        wanted = token_ids.count(self.config.image_token_id) if self.config.vision else 0
        if tiles and self._vision is None:
            raise HerdError("this model reads text only, images were given")
        if tiles * per_tile != wanted:
            raise HerdError(f"{tiles} image tiles fill {tiles * per_tile} image tokens, the prompt has {wanted}")

    def _check_tokens(self, sequence: Sequence, token_ids: Items[int]) -> None:
        text = self.config.text
        if not token_ids:
            raise HerdError("no tokens were given, at least one is needed")
        wrong = next((token for token in token_ids if not 0 <= token < text.vocab_size), None)
        if wrong is not None:
            raise HerdError(f"token id {wrong} is outside of the vocabulary of {text.vocab_size}")
        total = len(sequence) + len(token_ids)
        if total > text.max_position_embeddings:
            raise HerdError(f"{total} tokens are more than the context of {text.max_position_embeddings}")


def _load_verified(bundle: Bundle, options: ExecutorOptions, verify: bool) -> Runners:
    """Load a whole bundle, and hash its weights meanwhile."""
    if verify:
        bundle.verify(set(bundle.manifest.files) - set(bundle.weight_files))
    # Weights that are used as they are mapped may be larger than the memory: hashing would read them all.
    weights = bundle.weight_files if verify and options.prepack else []
    with ThreadPoolExecutor(1) as pool:
        hashing = pool.submit(bundle.verify, weights)
        try:
            return load_executor(bundle, options)
        finally:
            hashing.result()
