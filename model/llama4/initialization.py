"""Random weights that a Llama 4 begins with: even chances for all words, and the same signals at every width and depth.

With D width, C width of the image tower, K inputs of a matrix, L layers of a stack, N(s) normal with deviation s:

    embeddings                          N(e), e = 0.3         the same at every width
    projections, gates, experts         N(1 / sqrt(K))        variance 1 from variance 1 (LeCun et al. 1998)
    outputs into the residual stream    N(e / sqrt(2 L K))    all 2 L branches together as large as the stream (GPT-2)
    routers, a head of its own          N(0.38 r), r = min(1 / sqrt(D), 16 / D)      logits of 0.38, less from D = 256
    tied head: final norm's weight      min(1, 0.25 r / e)    the same for a head that has to be N(e)
    image tower                         as above; biases 0; positions and class token N(1 / sqrt(C)), as CLIP's
    what follows a GELU in the adapter  1.53 times as much    gives back what the GELU took
    projector                           e times as much       image features are as large as the embeddings beside them

The powers of the width are those of maximal update parametrization (Yang et al. 2022, Tensor Programs V, table 3; for
mixtures of experts Malasnicki et al. 2025, arXiv 2508.09752); the learning rates that belong to them come with
``optimizer.base_width``. Llama 4 has no factor on its logits: where the head is the embedding, the final norm has it.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from .decoder import Attention, Decoder, Experts, FeedForward, MixtureOfExperts
from .model import Llama4
from .vision import VisionAttention, VisionMLP, VisionModel, VisionTower

EMBEDDING_STD = 0.3
"""Norms hide the size of the stream, so it decides only how fast it changes. On text at a width of 128, with AdamW,
1 did as well for a head of its own and worse for a tied one, 0.1 worse for both.
"""

LOGIT_STD, TIED_LOGIT_STD, LOGIT_WIDTH = 0.38, 0.25, 256
"""As large as a loss of ln V + 0.1 allows: smaller ones learn more slowly. A tied head already knows its own input."""

GELU_GAIN = 1.53
"""1 / sqrt(E gelu(x)^2) of standard normal x."""


@torch.no_grad()
def initialize(model: Llama4) -> Llama4:
    """Give a model random weights, in place, drawn from torch's generator. Norms stay at one."""
    _initialize_decoder(model.decoder)
    if model.vision is not None:
        _initialize_tower(model.vision)
    return model


def _initialize_decoder(decoder: Decoder) -> None:
    text, width = decoder.config.text, decoder.config.text.hidden_size
    nn.init.normal_(decoder.embed_tokens.weight, std=EMBEDDING_STD)
    if text.tie_word_embeddings:
        nn.init.constant_(decoder.norm.weight, min(1.0, _for_logits(width, TIED_LOGIT_STD) / EMBEDDING_STD))
    else:
        nn.init.normal_(decoder.lm_head.weight, std=_for_logits(width, LOGIT_STD))
    _initialize_layers(decoder.layers)


def _initialize_tower(tower: VisionTower) -> None:
    vision: VisionModel = tower.vision_model
    width = vision.class_embedding.numel()
    for embedding in (vision.class_embedding, vision.positional_embedding_vlm):
        nn.init.normal_(embedding, std=width**-0.5)
    _initialize_layers(vision.model.layers)
    adapter = vision.vision_adapter.mlp
    _project(vision.patch_embedding.linear)
    _project(adapter.fc1)
    _project(adapter.fc2, GELU_GAIN)
    _project(tower.multi_modal_projector.linear_1, GELU_GAIN * EMBEDDING_STD)


def _initialize_layers(layers: nn.ModuleList) -> None:
    branch = EMBEDDING_STD * (2 * len(layers)) ** -0.5
    to_residual = partial(_project, gain=branch)
    for part in layers.modules():
        match part:
            case Attention() | VisionAttention():
                for projection in (part.q_proj, part.k_proj, part.v_proj):
                    _project(projection)
                to_residual(part.o_proj)
            case FeedForward():
                _project(part.gate_proj)
                _project(part.up_proj)
                to_residual(part.down_proj)
            case MixtureOfExperts():
                nn.init.normal_(part.router.weight, std=_for_logits(part.router.in_features, LOGIT_STD))
            case Experts():
                _by_inputs(part.gate_up_proj, part.gate_up_proj.shape[1])
                _by_inputs(part.down_proj, part.down_proj.shape[1], branch)
            case VisionMLP():
                _project(part.fc1)
                to_residual(part.fc2)


def _for_logits(width: int, std: float) -> float:
    """Deviation of weights that make of a normalised stream logits of a deviation; that of maximal updates if wide."""
    return std / math.sqrt(width) * min(1.0, math.sqrt(LOGIT_WIDTH / width))


def _project(linear: nn.Linear, gain: float = 1.0) -> None:
    _by_inputs(linear.weight, linear.in_features, gain)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def _by_inputs(weight: Tensor, inputs: int, gain: float = 1.0) -> None:
    nn.init.normal_(weight, std=gain * inputs**-0.5)
