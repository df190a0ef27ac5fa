"""What experts are chosen for, and what it costs to exchange them.

Shapes: L mixture layers, C classes of tokens, E experts, V vocabulary, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from herdgraph.model.llama4.decoder import Experts
from herdgraph.model.training.data import Batch
from herdgraph.model.training.data.packing import PADDING

CLASSES = ("begins a word", "goes on in a word", "number", "blank", "sign")
Found = TypeVar("Found")


def with_hooks(layers: Sequence[Experts], hook: Any, run: Callable[[], Found]) -> Found:
    """What a function gives while experts have a hook before them."""
    hooks = [layer.register_forward_pre_hook(hook) for layer in layers]
    found = run()
    for each in hooks:
        each.remove()
    return found


def exchange(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The next expert in place of each, with the same score."""
    x_TD, logits_TE = inputs
    return x_TD, logits_TE.roll(1, dims=-1)


@torch.no_grad()
def counts_by_class(
    layers: Sequence[Experts], classes_V: Tensor, batches: Sequence[Batch], run: Callable[[Batch], object]
) -> Tensor:
    """How many tokens of each class go to each expert of each layer, [L, C, E]."""
    experts = layers[0].gate_up_proj.shape[0]
    counts_LCE = torch.zeros(len(layers), len(CLASSES), experts)
    for batch in batches:
        chosen: dict[nn.Module, Tensor] = {}
        with_hooks(layers, lambda layer, inputs, chosen=chosen: chosen.update({layer: inputs[1].argmax(-1)}),
                   lambda batch=batch: run(batch))
        real_T = batch.document_BT.flatten() != PADDING
        classes_T = classes_V[batch.input_ids_BT.flatten()[real_T]]
        for index, layer in enumerate(layers):
            pairs_T = classes_T * experts + chosen[layer][real_T]
            counts_LCE[index] += torch.bincount(pairs_T, minlength=counts_LCE[index].numel()).view(-1, experts)
    return counts_LCE


def token_classes(directory: Path) -> Tensor:
    """The class of every token of a byte-level vocabulary, [V]."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    return torch.tensor([_class_of(tokenizer.id_to_token(index) or "") for index in range(tokenizer.get_vocab_size())])


def _class_of(token: str) -> int:
    text = token.replace("\u0120", " ").replace("\u010a", "\n")  # how byte-level tokenizers write them
    word = text.strip()
    if not word:
        return CLASSES.index("blank")
    if word.isdigit():
        return CLASSES.index("number")
    if not word[0].isalpha():
        return CLASSES.index("sign")
    return CLASSES.index("begins a word" if text[0] == " " else "goes on in a word")


def mutual_information(counts_CE: Tensor) -> float:
    """What an expert tells of the class of its token, as a share of the entropy of the class."""
    joint_CE = counts_CE.double() / counts_CE.sum()
    class_C1, expert_1E = joint_CE.sum(1, keepdim=True), joint_CE.sum(0, keepdim=True)
    information = torch.xlogy(joint_CE, joint_CE / (class_C1 * expert_1E).clamp(min=1e-300)).sum()
    return float(information / -torch.xlogy(class_C1, class_C1).sum())
