"""Measures transformers' Llama 4 for ``benchmarks.compare``; a worker as ``contest.py`` describes.

``variant`` is a dtype of torch: float32 or bfloat16.
"""

from __future__ import annotations

import copy

import numpy as np
import torch

from .contest import Task, Times, measure, serve
from .peers import let_torchvision_import


class TransformersRunner:
    """``Llama4ForCausalLM`` with its own cache as a ``Runner``."""

    def __init__(self, task: Task) -> None:
        let_torchvision_import()
        from transformers import Llama4ForCausalLM

        torch.set_num_threads(task.threads)
        dtype = getattr(torch, task.variant)
        self._model = Llama4ForCausalLM.from_pretrained(task.model, dtype=dtype).eval()

    def prefill(self, tokens: list[int]) -> torch.Tensor:
        """Read a prompt into a new cache."""
        output = self._model(torch.tensor([tokens]), use_cache=True, logits_to_keep=1)
        self._prompt = output.past_key_values
        return output.logits

    def fork(self, count: int) -> None:
        """Copy the prompt's cache, row by row."""
        self._cache = copy.deepcopy(self._prompt)
        self._cache.batch_repeat_interleave(count)

    def step(self, tokens: list[int]) -> torch.Tensor:
        """Decode all rows in one call."""
        rows = torch.tensor(tokens)[:, None]
        return self._model(rows, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits

    def save_logits(self, tokens: list[int], path: str) -> None:
        """Logits of all positions."""
        np.save(path, self._model(torch.tensor([tokens]), use_cache=False).logits[0].float().numpy())


def work(task: Task) -> Times:
    """Measure one dtype."""
    with torch.inference_mode():
        return measure(lambda: TransformersRunner(task), task)


if __name__ == "__main__":
    serve(work)
