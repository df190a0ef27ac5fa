"""Second moments of the inputs of matrix products: what GPTQ needs to know of the data.

    H = sum over tokens of  x^T x        [K, K], for the input x [K] of a weight [K, N]

Besides, the largest keys and values of every layer, for caches in 8 bits.

The error of a quantised product on the data is  tr((W - Q)^T H (W - Q)).  A routed expert is seen by its own tokens
only, its input scaled by its score as in the model; one that saw few borrows a share of what all experts of its layer
saw.

The model runs in torch, in float32, and is held in memory as a whole. Inputs are those of the rotated model
(``export/rotation.py``), because that is what is quantised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from ..errors import HerdError
from ..export.moments import LARGEST
from ..export.recipes import Recipe
from ..export.rotation import RotatedCheckpoint
from ..model.checkpoint import Checkpoint
from ..model.decoder import Attention, Decoder, Experts
from ..model.herd import Llama4
from ..model.processing import PromptProcessor

WINDOW = 512
BORROWED = 0.05
"""Share of the moments of all experts of a layer that each expert gets besides its own."""


class Moments:
    """Accumulates x^T x by the name of the weight that x meets; experts are stacked, [E, K, K]."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.largest: dict[str, Tensor] = {}

    def add(self, name: str, x: Tensor, *, expert: int | None = None, experts: int = 0) -> None:
        """Take in the rows of x [..., K]."""
        rows = x.reshape(-1, x.shape[-1]).float()
        size = rows.shape[1]
        if name not in self.sums:
            self.sums[name] = torch.zeros((experts, size, size) if expert is not None else (size, size))
        target = self.sums[name] if expert is None else self.sums[name][expert]
        target.addmm_(rows.T, rows)

    def keep_largest(self, name: str, *values: Tensor) -> None:
        """Take in the largest magnitudes of some tensors."""
        found = torch.stack([value.abs().max().float() for value in values])
        self.largest[name] = torch.maximum(self.largest.get(name, found), found)

    def tensors(self) -> dict[str, Tensor]:
        """Everything measured, as it is stored."""
        return {name: total.contiguous() for name, total in (self.shared_among_experts() | self.largest).items()}

    def shared_among_experts(self) -> dict[str, Tensor]:
        """The sums, every expert's with its share of its layer's."""
        return {
            name: total + BORROWED * total.sum(0, keepdim=True) if total.ndim == 3 else total
            for name, total in self.sums.items()
        }


def windows_of(checkpoint: Checkpoint, texts: Iterable[str]) -> list[list[int]]:
    """Texts as token ids, cut into windows of ``WINDOW``.

    Raises:
        HerdError: the checkpoint has no tokenizer, or there is too little text.
    """
    tokenizer = PromptProcessor(checkpoint.directory, checkpoint.config).tokenizer
    ids = [token for text in texts for token in tokenizer.encode(text)]
    if len(ids) < WINDOW:
        raise HerdError(f"the text has {len(ids)} tokens, at least {WINDOW} are needed: give more text")
    return [ids[first : first + WINDOW] for first in range(0, len(ids), WINDOW)]


def measure(
    checkpoint: Checkpoint, recipe: Recipe, windows: Sequence[list[int]], output: Path,
    on_window: Callable[[int, int], None] = lambda _done, _total: None,
) -> int:
    """Run a checkpoint on tokens and write the moments that a recipe wants.

    Args:
        checkpoint: an open checkpoint.
        recipe: tells which weights are stored in 4 bits; only their inputs are measured.
        windows: token ids, each list read from its beginning.
        output: safetensors file, replaced when complete.
        on_window: called with windows done and in all, for progress.

    Returns:
        Tokens seen.
    """
    decoder = Llama4.from_checkpoint(RotatedCheckpoint(checkpoint)).eval().decoder
    moments = Moments()
    watch(decoder, moments, recipe)
    with torch.inference_mode():
        for done, window in enumerate(windows, 1):
            decoder(torch.tensor([window]))
            on_window(done, len(windows))
    temporary = output.with_suffix(".partial")
    tokens = sum(map(len, windows))
    metadata = {"fingerprint": checkpoint.fingerprint(), "tokens": str(tokens)}
    save_file(moments.tensors(), temporary, metadata)
    temporary.rename(output)
    return tokens


def watch(decoder: Decoder, moments: Moments, recipe: Recipe) -> None:
    """Let products of feed-forwards that the recipe stores in 4 bits report their input, attention keys and values."""
    for name, part in decoder.named_modules():
        if isinstance(part, nn.Linear) and wants_moments(recipe, f"{name}.weight"):
            part.register_forward_pre_hook(_linear_hook(moments, f"{name}.weight"))
        elif isinstance(part, Experts) and wants_moments(recipe, f"{name}.down_proj"):
            part.register_forward_pre_hook(_experts_hook(moments, name))
        elif isinstance(part, Attention):
            part.register_forward_pre_hook(_attention_hook(moments, f"{name}.{LARGEST}"))


def wants_moments(recipe: Recipe, weight: str) -> bool:
    """True for weights in 4 bits, the embedding and the head excepted."""
    return getattr(recipe.layout_of(weight), "bits", 8) == 4 and weight.startswith("layers.")


def _linear_hook(moments: Moments, name: str) -> Callable[..., None]:
    return lambda _module, inputs: moments.add(name, inputs[0])


def _attention_hook(moments: Moments, name: str) -> Callable[[Attention, Sequence[Any]], None]:
    return lambda attention, inputs: moments.keep_largest(name, *attention.project(*inputs[:2])[1:])


def _experts_hook(moments: Moments, name: str) -> Callable[[Experts, Sequence[Any]], None]:
    def hook(experts: Experts, inputs: Sequence[Any]) -> None:
        x_TD, logits_TE = inputs
        logits_Tk, chosen_Tk = logits_TE.topk(experts.top_k, dim=-1)
        scaled_TkD = x_TD[:, None] * torch.sigmoid(logits_Tk)[..., None]
        count = len(experts.down_proj)
        for expert in range(count):
            x_RD = scaled_TkD[chosen_Tk == expert]
            gate, up = (x_RD @ experts.gate_up_proj[expert]).chunk(2, dim=-1)
            moments.add(f"{name}.gate_up_proj", x_RD, expert=expert, experts=count)
            moments.add(f"{name}.down_proj", functional.silu(gate) * up, expert=expert, experts=count)

    return hook
