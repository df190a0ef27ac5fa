"""Experts that the data reaches, and what is done for those it does not.

A router sends most experts few tokens and some none. Sending all tokens through all experts, as calibrators do, shows
nothing here: an expert's input is its token times the sigmoid of its own logit, and where an expert was not chosen the
model has put minus infinity for that logit, so the expert is shown rows of zeros, and its scale divides by zero.

Here an expert that got fewer than ``min_tokens_shown`` tokens is shown more: those whose own logit for it is highest,
multiplied by the sigmoid of that logit, which is what the expert would have seen had the router sent them. Its output
for them is thrown away: the model's output stays that of its true choices.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import HerdError


@dataclass
class Coverage:
    """Counts tokens per layer and expert, and picks those that are shown in addition; a ``stream.RoutingHook``.

    Attributes:
        min_tokens_shown: tokens that every expert is to see.
        own: tokens that the router sent, [E] by layer.
        shown: tokens shown in addition, [E] by layer.
    """

    min_tokens_shown: int
    own: dict[int, Tensor] = field(default_factory=dict)
    shown: dict[int, Tensor] = field(default_factory=dict)
    _extra: dict[int, Tensor] = field(default_factory=dict)

    def routed(self, layer: int, logits_NE: Tensor, chosen_Nk: Tensor) -> None:
        """Count a layer's tokens and choose what to show to experts that got few."""
        experts = logits_NE.shape[1]
        chosen_NE = torch.zeros_like(logits_NE, dtype=torch.bool).scatter(1, chosen_Nk, True)
        own_E = chosen_NE.sum(0)
        self.own[layer], self.shown[layer] = own_E, torch.zeros_like(own_E)
        self._extra = {}
        for expert in range(experts):
            missing = min(self.min_tokens_shown, len(logits_NE)) - int(own_E[expert])
            if missing > 0:
                logits_N = logits_NE[:, expert].masked_fill(chosen_NE[:, expert], -torch.inf)
                # Stable: equal logits are taken in the order of the tokens, on every machine.
                self._extra[expert] = logits_N.argsort(descending=True, stable=True)[:missing].sort().values
                self.shown[layer][expert] = missing

    def extra_tokens(self, layer: int, expert: int) -> Tensor:
        """Tokens that an expert of the layer just routed is shown besides its own."""
        return self._extra.get(expert, torch.empty(0, dtype=torch.int64))

    def below(self, tokens: int) -> list[tuple[int, int, int]]:
        """Layer, expert and own tokens of all experts that got fewer than so many from the router."""
        return [
            (layer, expert, int(count)) for layer, own_E in sorted(self.own.items())
            for expert, count in enumerate(own_E) if count < tokens
        ]

    def require(self, tokens: int) -> None:
        """Fail when an expert got fewer tokens of its own.

        Raises:
            HerdError: names them.
        """
        if poor := self.below(tokens):
            names = ", ".join(f"layer {layer} expert {expert} ({count})" for layer, expert, count in poor[:5])
            more = f" and {len(poor) - 5} more" if len(poor) > 5 else ""
            raise HerdError(f"{len(poor)} experts got fewer than {tokens} tokens from the router: {names}{more}; give "
                            "more or other data, or lower --min-tokens")
