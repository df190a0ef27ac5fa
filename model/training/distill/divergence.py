"""How far a student's distribution q over the next token is from its teacher's p: KL(p || q) = sum p log(p / q).

It asks for mass wherever the teacher has some (Hinton et al. 2015). At temperature T its gradient in the logits is
(q - p) / T, and q - p shrinks by about 1 / T as well; the loss makes up for it with a factor T², once, not this file.

Shapes: N tokens, V vocabulary, S ids that the sum runs over (``targets.py``).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from .targets import Targets


def forward_kl(logits_NV: Tensor, targets: Targets, temperature: float = 1.0) -> Tensor:
    """The divergence of every token.

    Args:
        logits_NV: the student's, any floating type.
        targets: the teacher's.
        temperature: both distributions are softmax(logits / temperature).

    Returns:
        float32 [N], nats; at least 0 but for rounding.

    Raises:
        HerdError: the targets are for another vocabulary or temperature.
    """
    logp_NS, logq_NS = targets.pair(logits_NV.float(), temperature)
    return functional.kl_div(logq_NS, logp_NS, reduction="none", log_target=True).sum(-1)
