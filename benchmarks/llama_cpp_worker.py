"""Measures llama.cpp for ``benchmarks.compare``; a worker as ``contest.py`` describes.

Uses the C interface of llama-cpp-python with token ids, and imports nothing of herdgraph: it runs in any Python that
has llama_cpp. ``variant`` says whether flash attention is ``on`` or ``off``. Weights are repacked for this processor
when the library was built to do so; keys and values are float16, as is llama.cpp's default.
"""

from __future__ import annotations

import ctypes

import llama_cpp.llama_cpp as library
import numpy as np

from .contest import Task, Times, measure, serve

MICRO_BATCH = 512
_KEPT_ALIVE: list[object] = []


class LlamaCppRunner:
    """One model and one context as a ``Runner``; sequence n lives in stream n of the cache."""

    def __init__(self, task: Task) -> None:
        _be_quiet()
        library.llama_backend_init()
        self._model = library.llama_model_load_from_file(task.model.encode(), library.llama_model_default_params())
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {task.model}")
        self._sequences = len(task.steps[0])
        self._context = library.llama_init_from_model(self._model, self._parameters(task))
        self._memory = library.llama_get_memory(self._context)
        self._vocabulary = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self._model))
        self._batch = library.llama_batch_init(MICRO_BATCH, 0, 1)

    def _parameters(self, task: Task) -> library.llama_context_params:
        parameters = library.llama_context_default_params()
        per_sequence = max(len(task.prompt) + len(task.steps), len(task.probe))
        parameters.n_ctx = -(-per_sequence // 256) * 256 * self._sequences
        parameters.n_batch = parameters.n_ubatch = MICRO_BATCH
        parameters.n_seq_max = self._sequences
        parameters.n_threads = parameters.n_threads_batch = task.threads
        parameters.flash_attn_type = (
            library.LLAMA_FLASH_ATTN_TYPE_ENABLED if task.variant == "on" else library.LLAMA_FLASH_ATTN_TYPE_DISABLED)
        return parameters

    def prefill(self, tokens: list[int]) -> np.ndarray:
        """Read a prompt into sequence 0, a micro-batch at a time."""
        library.llama_memory_clear(self._memory, False)
        self._length = len(tokens)
        for first in range(0, len(tokens), MICRO_BATCH):
            piece = tokens[first : first + MICRO_BATCH]
            self._decode([(token, first + at, 0, first + at == len(tokens) - 1) for at, token in enumerate(piece)])
        return self._logits(-1)

    def fork(self, count: int) -> None:
        """Take decoded tokens back and copy sequence 0 to the others."""
        self._position = self._length
        library.llama_memory_seq_rm(self._memory, 0, self._length, -1)
        for sequence in range(1, self._sequences):
            library.llama_memory_seq_rm(self._memory, sequence, -1, -1)
        for sequence in range(1, count):
            library.llama_memory_seq_cp(self._memory, 0, sequence, -1, -1)

    def step(self, tokens: list[int]) -> list[np.ndarray]:
        """Decode one token of each sequence in one call."""
        self._decode([(token, self._position, sequence, True) for sequence, token in enumerate(tokens)])
        self._position += 1
        return [self._logits(row) for row in range(len(tokens))]

    def save_logits(self, tokens: list[int], path: str) -> None:
        """Logits of all positions, in one micro-batch."""
        library.llama_memory_clear(self._memory, False)
        self._decode([(token, at, 0, True) for at, token in enumerate(tokens)])
        np.save(path, np.stack([self._logits(row) for row in range(len(tokens))]))

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """Run tokens given as (token, position, sequence, whether its logits are wanted)."""
        self._batch.n_tokens = len(rows)
        for at, (token, position, sequence, wanted) in enumerate(rows):
            self._batch.token[at], self._batch.pos[at], self._batch.logits[at] = token, position, wanted
            self._batch.n_seq_id[at], self._batch.seq_id[at][0] = 1, sequence
        status = library.llama_decode(self._context, self._batch)
        if status:
            raise SystemExit(f"llama_decode returned {status}")

    def _logits(self, row: int) -> np.ndarray:
        pointer = library.llama_get_logits_ith(self._context, row)
        return np.ctypeslib.as_array(pointer, (self._vocabulary,)).copy()


def _be_quiet() -> None:
    """Keep the library's log out of the result."""
    @library.llama_log_callback
    def ignore(_level: int, _text: bytes, _data: ctypes.c_void_p) -> None:
        pass

    _KEPT_ALIVE.append(ignore)
    library.llama_log_set(ignore, ctypes.c_void_p(0))


def work(task: Task) -> Times:
    """Measure one file with or without flash attention."""
    return measure(lambda: LlamaCppRunner(task), task)


if __name__ == "__main__":
    serve(work)
