"""Judging by one forward pass says what generating token by token would."""

from __future__ import annotations

import numpy as np
import torch

from herdgraph.model.config.presets import TINY
from herdgraph.model.llama4.model import Llama4
from herdgraph.model.training.data import Encoded
from herdgraph.model.training.exact_match import exact_matches


def _generated(model: Llama4, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def _sample(key: int, prompt: list[int], answer: list[int]) -> Encoded:
    ids = np.array(prompt + answer)
    return Encoded(str(key), ids, np.array([False] * len(prompt) + [True] * len(answer)))


@torch.no_grad()
def test_right_is_what_greedy_decoding_would_write() -> None:
    torch.manual_seed(1)
    model = Llama4(TINY).train()
    generator = torch.Generator().manual_seed(2)
    samples, wanted = [], []
    for key in range(12):
        prompt = torch.randint(3, 400, (4 + key % 3,), generator=generator).tolist()
        answer = _generated(model.eval(), prompt, 3)
        model.train()
        if key % 2:  # one wrong token, at the beginning, in the middle or at the end
            answer[key % 3] = (answer[key % 3] + 1) % 400
        samples.append(_sample(key, prompt, answer))
        wanted.append(key % 2 == 0)
    assert exact_matches(model, samples) == wanted
    assert model.training
