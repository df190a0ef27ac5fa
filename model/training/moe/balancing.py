"""Even load: how a router is kept from sending every token to the same few experts.

Without a loss (Wang et al. 2024, arXiv 2408.15664; DeepSeek-V3): a bias per expert is added to the logits when experts
are *chosen*, never to the score that scales their input, and after each step moves against the error of the load:

    b_e <- b_e + u · (sign(mean(n) - n_e) - mean over experts of that sign),     n_e tokens that expert e got

With losses, both off by default, for T tokens, k experts per token and sigmoid scores s:

    balance = E · sum_e f_e P_e,   f_e = n_e / (k T),   P_e = mean_t s_te / sum_i s_ti    (DeepSeek-V3; 1 if even)
    z       = mean_t (log sum_e exp logit_te)^2                                       (ST-MoE, arXiv 2202.08906)

Llama 4 serves *without* a bias: its router is a plain matrix. So the bias acts in training mode only, ``eval()`` gives
the model that is exported, and ``moved`` counts the tokens that the bias sent elsewhere. For the model to be trained
as it is served, the bias fades over the last share f of S steps: what acts in step s, counted from 0, is

    min(1, (S - 1 - s) / (f S)) · b_e,      nothing in the very last step

Shapes: T tokens, E experts, k chosen experts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def tokens_per_expert(experts_Tk: Tensor, experts: int) -> Tensor:
    """How many tokens chose each expert, int64 [E]; no waiting for the device, unlike ``bincount``."""
    chosen = experts_Tk.flatten()
    return chosen.new_zeros(experts).scatter_add_(0, chosen, torch.ones_like(chosen))


def rerouted_tokens(plain_Tk: Tensor, biased_Tk: Tensor) -> Tensor:
    """Tokens whose set of experts differs between two choices, int64 scalar."""
    return (plain_Tk.sort(-1).values != biased_Tk.sort(-1).values).any(-1).sum()


def updated_bias(bias_E: Tensor, counts_E: Tensor, rate: float) -> Tensor:
    """The bias after one update.

    Args:
        bias_E: before.
        counts_E: tokens that each expert got, over all ranks.
        rate: u.
    """
    error_E = torch.sign(counts_E.float().mean() - counts_E)
    # Equal shifts of all experts choose nothing; without them the bias stays small.
    return bias_E + rate * (error_E - error_E.mean())


def bias_schedule(step: int, steps: int, fade: float) -> float:
    """The share of the bias that acts in a step, counted from 0, of so many; ``fade`` is f, 0 for all of it always."""
    return min(1.0, (steps - 1 - step) / (fade * steps)) if fade else 1.0


def load_balancing_loss(logits_TE: Tensor, experts_Tk: Tensor) -> Tensor:
    """E · sum f P: 1 when loads or scores are even, up to E when one expert has it all."""
    experts = logits_TE.shape[1]
    scores_TE = torch.sigmoid(logits_TE)
    share_E = (scores_TE / scores_TE.sum(-1, keepdim=True)).mean(0)
    load_E = tokens_per_expert(experts_Tk, experts) / experts_Tk.numel()
    return experts * (load_E * share_E).sum()


def router_z_loss(logits_TE: Tensor) -> Tensor:
    """The mean square of log-sum-exp: keeps logits small, where low precision is still fine."""
    return logits_TE.logsumexp(-1).square().mean()
