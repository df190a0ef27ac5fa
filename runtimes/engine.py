"""The engine: what applications embed.

>>> from herdgraph import Engine
>>> engine = Engine.load("bundle")
>>> print(engine.generate("Once upon a time", max_new_tokens=32).text)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Items
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import HerdError, StoppedError, shown
from ..files import size
from ..model.config import HerdConfig
from ..model.processing import Prompt, PromptProcessor, whole_numbers
from ..model.processing.pictures import Source
from .bundle.manifest import Bundle
from .distributed.collectives import TIMEOUT
from .executors.options import ExecutorOptions, Memory
from .executors.runner import Logits, Row, Runner
from .executors.vision import VisionRunner
from .generation import Asked, Generation, Request, TextStream
from .kv_cache.sequence import Sequence, exclusive
from .load import load_runners
from .token_checks import check_batch, check_images, check_tokens


class Engine:
    """A loaded bundle: generates text, or gives logits to those who bring their own loop.

    One engine serves many sequences; one sequence belongs to one thread at a time.
    """

    def __init__(self, bundle: Bundle, decoder: Runner, vision: VisionRunner | None) -> None:
        self.bundle, self._decoder, self._vision = bundle, decoder, vision

    @classmethod
    def load(
        cls, path: str | Path, *, threads: int | None = None, verify: bool = True, memory: Memory = "fast",
        cache_bytes: int | None = None, device: str | None = None, gpu_memory: int | None = None,
        devices: Items[str] | None = None, timeout: float = TIMEOUT,
    ) -> Engine:
        """Open, check and load a bundle.

        Args:
            path: bundle directory.
            threads: threads of one operator on every rank, None for one per core.
            verify: compare every file's SHA-256 with the manifest, weights while they load; with ``memory="low"``
                every block of the weights when it is first read.
            memory: ``fast`` packs all weights for speed, in memory of their own; ``low`` uses them as they lie in the
                bundle, and the operating system reads and drops them page by page: a bundle may be larger than the
                memory, and experts that are never chosen are never read.
            cache_bytes: that keys and values of all sequences may use, on every rank; None for half of the memory that
                is free then, on a GPU for what is left of ``gpu_memory``. Memory is taken as sequences grow; of a GPU
                it is taken at once.
            device: of a bundle for a GPU, which one; None for ``cuda:0``, and for a sharded one, whose ranks take the
                GPUs of their numbers.
            gpu_memory: bytes that weights, keys and values, and calls may take there together, on every rank; None for
                nine tenths of what is free.
            devices: of a sharded bundle, per rank the cores that it may use, such as ``["0-7", "8-15"]``.
            timeout: of a sharded bundle, seconds that a rank may keep the others waiting in the middle of a call.

        A sharded bundle starts its other ranks as processes of this machine; under torchrun it joins them, and only
        rank 0 gets an engine (docs/sharding.md). Close the engine, or use it as a context manager.

        Raises:
            HerdError: the bundle is incomplete, altered, or made for another runtime.
        """
        options = ExecutorOptions.of(threads, memory, verify=verify, cache_bytes=cache_bytes, device=device,
                                     gpu_memory=gpu_memory)
        bundle = Bundle.open(path, verify=False)
        engine = cls(bundle, *load_runners(bundle, options, devices=devices, timeout=timeout))
        engine._warm_up()
        return engine

    def _warm_up(self) -> None:
        """Run a token, so that buffers that a first call allocates are there before somebody waits for it."""
        self._step(self.new_sequence(), 0)

    def __repr__(self) -> str:
        manifest, text = self.bundle.manifest, self.config.text
        what = f"{manifest.target} {manifest.recipe}, {text.num_layers} layers, {text.num_experts} experts"
        state = f", closed: {self.closed}" if self.closed else ""
        return f"<Engine {str(self.bundle.directory)!r}: {what}, {size(self.bundle.bytes)}{state}>"

    def close(self) -> None:
        """Free the weights and end the other processes of a sharded engine; afterwards every call is refused."""
        self._decoder.close()

    def wait_until_resident(self) -> None:
        """Wait until weights lie in the memory where they stay: a copy runs beside the first calls and slows them.

        There is no need to; measurements of speed do it.
        """
        self._decoder.wait_until_resident()

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

    @property
    def runner(self) -> Runner:
        """What runs the decoder, for schedulers with many sequences."""
        return self._decoder

    @property
    def vision(self) -> VisionRunner | None:
        """What runs the image tower, None for models that read text only."""
        return self._vision

    @cached_property
    def processor(self) -> PromptProcessor:
        """Text and images to tokens and back, from the files the checkpoint brought along."""
        return PromptProcessor(self.bundle.processor, self.config)

    # -- text in, text out ---------------------------------------------------------------------------------------

    def generate(
        self, prompt: Prompt, *, max_new_tokens: int = 256, stop: str | Items[str] = (),
        stop_ids: Iterable[int] | None = None, images: Items[Source] | None = None,
        tools: Items[Mapping[str, Any]] | None = None, sequence: Sequence | None = None,
        temperature: float | None = None, top_k: int | None = None, top_p: float | None = None,
        min_p: float | None = None, repetition_penalty: float | None = None, seed: int | None = None,
        logprobs: int | None = None,
    ) -> Generation:
        """Generate to the end. Arguments and errors as in ``stream``."""
        stream = self.stream(
            prompt, max_new_tokens=max_new_tokens, stop=stop, stop_ids=stop_ids, images=images, tools=tools,
            sequence=sequence, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            repetition_penalty=repetition_penalty, seed=seed, logprobs=logprobs)
        for _ in stream:
            pass
        return stream.result

    def stream(
        self, prompt: Prompt, *, max_new_tokens: int = 256, stop: str | Items[str] = (),
        stop_ids: Iterable[int] | None = None, images: Items[Source] | None = None,
        tools: Items[Mapping[str, Any]] | None = None, sequence: Sequence | None = None,
        temperature: float | None = None, top_k: int | None = None, top_p: float | None = None,
        min_p: float | None = None, repetition_penalty: float | None = None, seed: int | None = None,
        logprobs: int | None = None,
    ) -> TextStream:
        """Generate, and yield text as soon as it is certain.

        Args:
            prompt: a string or its token ids (raw completion), or chat messages.
            max_new_tokens: length limit; the model's context is another.
            stop: one string, or several, that end the text before them.
            stop_ids: tokens that end the text, None for the model's own.
            images: pictures for the ``<|image|>`` placeholders of a string prompt; messages carry their own.
            tools: descriptions of functions for chat templates that offer them to the model.
            sequence: continue this one: the prefix that it shares with the prompt is not computed again.
            temperature: see ``Sampling``. For this and the next four, None takes what the checkpoint's
                ``generation_config.json`` recommends, and without one the most likely token is chosen.
            top_k: see ``Sampling``.
            top_p: see ``Sampling``.
            min_p: see ``Sampling``.
            repetition_penalty: see ``Sampling``.
            seed: of the draws, None for another each time.
            logprobs: report every token's log-probability and so many alternatives, None for neither.

        Returns:
            An iterator of text deltas with a ``result``.

        Raises:
            HerdError: an impossible prompt or option.
        """
        asked = Asked.of(
            self.processor, self.config, prompt, max_new_tokens=max_new_tokens, stop=stop, stop_ids=stop_ids,
            images=images, tools=tools, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            repetition_penalty=repetition_penalty, seed=seed, logprobs=logprobs)
        if sequence is not None and not isinstance(sequence, Sequence):
            raise HerdError(f"sequence is {shown(sequence)}, one made by engine.new_sequence() is needed")
        step = self._greedy_step if asked.sampling.is_greedy else self._step
        request = Request(self, step, self.new_sequence() if sequence is None else sequence, asked.prompt)
        return TextStream(
            request.prefill, request.decode, tokenizer=self.processor.tokenizer, prompt_ids=asked.prompt.token_ids,
            sampling=asked.sampling, stop=asked.stop, never=asked.never)

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
        token_ids = whole_numbers(token_ids)
        self._decoder.require_open()
        check_tokens(self.config, sequence, token_ids)
        tiles = np.zeros(0, np.float32) if pixel_values is None else pixel_values
        check_images(self.config, token_ids, len(tiles))
        none = np.zeros((0, self.config.text.hidden_size), np.float32)
        features = self._vision.features(tiles) if self._vision and len(tiles) else none
        with sequence.exclusive():
            wanted = len(sequence) + len(token_ids)
            logits = self._decoder.prefill(sequence, token_ids, features, all_positions=all_positions)
            if len(tiles):
                sequence.append_images(features, tiles)
            if len(sequence) < wanted:
                self._decoder.truncate(sequence, len(sequence))  # the features of what was not computed
                raise StoppedError(f"the prompt was stopped after {len(sequence)} of {wanted} tokens")
        return logits

    def decode(self, sequence: Sequence, token_id: int) -> Logits:
        """Append one text token; returns its logits, float32 [vocabulary]."""
        check_images(self.config, [token_id])
        return self._step(sequence, token_id).copy()

    def _step(self, sequence: Sequence, token_id: int) -> Logits:
        """Append one token, chosen by a caller or by the model itself; its logits are valid until the next call."""
        self._decoder.require_open()
        check_tokens(self.config, sequence, [token_id])
        with sequence.exclusive():
            return self._decoder.decode(sequence, int(token_id))

    def _greedy_step(self, sequence: Sequence, token_id: int) -> Row:
        """Append one token, chosen by the model; what follows, where the most likely token is all that is wanted."""
        self._decoder.require_open()
        check_tokens(self.config, sequence, [token_id])
        never = (self.config.image_token_id,) if self.config.vision else ()
        with sequence.exclusive():
            return self._decoder.decode_greedy(sequence, int(token_id), never)

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
        self._decoder.require_open()
        check_batch(self.config, sequences, token_ids)
        with exclusive(sequences):
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
        self._decoder.require_open()
        with sequence.exclusive():
            self._decoder.truncate(sequence, length)
