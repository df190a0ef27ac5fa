"""The Llama 4 decoder: iRoPE attention and mixture-of-experts feed-forward, plain and trainable.

Shapes: B batch, T tokens, D width, N = query heads · head dimension, S cache slots, V vocabulary, P image tokens,
R rows whose logits are wanted. Parameter names are Hugging Face's without their ``language_model.model.`` prefix.

One layer:  h = x + attention(norm(x));  y = h + feed_forward(norm(h))
Feed-forward of a mixture layer:  shared(x) + routed(x), see ``operators.routed_experts``.
Attention, in this order: project; rotate (RoPE layers); normalise each head of q and k (``use_qk_norm``, RoPE layers);
scale q by its temperature (layers without RoPE); attend. Keys enter the cache after rotation and norm.

A packed row holds several documents. Each is computed as if it stood alone: positions, chunks and temperature count
from its own start, and no token sees another document.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..config import HerdConfig, TextConfig
from .operators import (
    cached_attention,
    document_lengths,
    document_positions,
    full_sequence_attention,
    rms_norm,
    rotary_embedding,
    routed_experts,
)
from .rope import DecoderRotary


class KVCache(NamedTuple):
    """Keys and values of one layer, [B, kv_heads, S, head_dim] each."""

    k: Tensor
    v: Tensor


class Positions(NamedTuple):
    """The tokens' positions in the forms that layers use, computed once for all layers."""

    cos_BTh: Tensor
    sin_BTh: Tensor
    temperature_BT1: Tensor
    past_lengths_B: Tensor
    documents: Sequence[int] | None = None
    """Lengths of the documents of packed rows; None when every row is one document."""


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight per element."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        return rms_norm(x, self.weight, self.eps)


class HeadNorm(nn.Module):
    """Root-mean-square norm of each head by itself, without weight (Llama 4's QK-norm)."""

    ones: Tensor

    def __init__(self, head_dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("ones", torch.ones(head_dim), persistent=False)

    def forward(self, x_BTN: Tensor) -> Tensor:
        """Normalise every head of [B, T, heads · head_dim]."""
        return rms_norm(x_BTN.unflatten(-1, (-1, self.ones.numel())), self.ones, self.eps).flatten(-2)


class Attention(nn.Module):
    """Grouped-query attention of one layer, chunked with RoPE or global without."""

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.num_heads, self.kv_heads = config.num_heads, config.num_kv_heads
        self.chunk = config.chunk_of(layer)
        # The two kinds of layers (iRoPE) differ in three things: RoPE layers rotate, attend in chunks and may normalise
        # queries and keys; the others do none of it, and scale queries by a temperature that grows with the position.
        self.rotates = config.rope_layers[layer]
        self.tuned = config.attn_temperature_tuning and not self.rotates
        self.qk_norm = HeadNorm(config.head_dim, config.rms_norm_eps) if config.use_qk_norm and self.rotates else None
        width, head = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(width, config.num_heads * head, bias=False)
        self.k_proj = nn.Linear(width, config.num_kv_heads * head, bias=False)
        self.v_proj = nn.Linear(width, config.num_kv_heads * head, bias=False)
        self.o_proj = nn.Linear(config.num_heads * head, width, bias=False)

    def forward(self, x_BTD: Tensor, positions: Positions, cache: KVCache | None) -> tuple[Tensor, KVCache | None]:
        """Attend to the cache and the new tokens, or to the new tokens alone when there is no cache."""
        q_BTN, k_BTM, v_BTM = self.project(x_BTD, positions)
        if cache is None:
            y_BTN = full_sequence_attention(
                q_BTN, k_BTM, v_BTM, num_heads=self.num_heads, kv_heads=self.kv_heads, chunk=self.chunk,
                documents=positions.documents,
            )
            return self.o_proj(y_BTN), None
        y_BTN, k, v = cached_attention(
            q_BTN, k_BTM, v_BTM, *cache, positions.past_lengths_B, num_heads=self.num_heads, chunk=self.chunk
        )
        return self.o_proj(y_BTN), KVCache(k, v)

    def project(self, x_BTD: Tensor, positions: Positions) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ready to attend, and keys and values as they enter the cache."""
        q_BTN, k_BTM, v_BTM = self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)
        if self.rotates:
            q_BTN = rotary_embedding(q_BTN, positions.cos_BTh, positions.sin_BTh, num_heads=self.num_heads)
            k_BTM = rotary_embedding(k_BTM, positions.cos_BTh, positions.sin_BTh, num_heads=self.kv_heads)
        # After the rotation, and over each head by itself: one norm over all heads is another function, and cost vLLM
        # about 3 points of MMLU-Pro until it was found (vllm#16311).
        if self.qk_norm is not None:
            q_BTN, k_BTM = self.qk_norm(q_BTN), self.qk_norm(k_BTM)
        # The temperature is float32 and the product is rounded once, back to the type of q.
        if self.tuned:
            q_BTN = (q_BTN * positions.temperature_BT1).type_as(q_BTN)
        return q_BTN, k_BTM, v_BTM


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape ending in the width."""
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """The routed experts of one layer, fused: the contraction axis is 1, unlike ``nn.Linear``."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.top_k = config.top_k
        experts, width, inner = config.num_experts, config.hidden_size, config.expert_size
        # As Hugging Face stores them, gate columns first; Meta's files have [E · D, F] for each (``checkpoint/meta``).
        self.gate_up_proj = nn.Parameter(torch.empty(experts, width, 2 * inner))
        self.down_proj = nn.Parameter(torch.empty(experts, inner, width))
        nn.init.normal_(self.gate_up_proj, std=width**-0.5)
        nn.init.normal_(self.down_proj, std=inner**-0.5)

    def forward(self, x_TD: Tensor, logits_TE: Tensor) -> Tensor:
        """Tokens and router logits to the sum of the chosen experts' outputs."""
        return routed_experts(x_TD, logits_TE, self.gate_up_proj, self.down_proj, top_k=self.top_k)


class MixtureOfExperts(nn.Module):
    """A shared expert for every token plus the experts that the router picks."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.router = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = Experts(config)
        self.shared_expert = FeedForward(config.hidden_size, config.expert_size)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Shared plus routed."""
        x_TD = x_BTD.flatten(0, 1)
        return (self.shared_expert(x_TD) + self.experts(x_TD, self.router(x_TD))).view_as(x_BTD)


class DecoderLayer(nn.Module):
    """Attention and feed-forward with their norms and residuals."""

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # A dense layer is twice as wide as an expert in the released models: 16384 and 8192.
        self.feed_forward: nn.Module
        if layer in config.moe_layers:
            self.feed_forward = MixtureOfExperts(config)
        else:
            self.feed_forward = FeedForward(config.hidden_size, config.dense_size)

    def forward(self, x_BTD: Tensor, positions: Positions, cache: KVCache | None) -> tuple[Tensor, KVCache | None]:
        """One layer; returns its output and its cache after the append."""
        attended, cache = self.self_attn(self.input_layernorm(x_BTD), positions, cache)
        x_BTD = x_BTD + attended
        return x_BTD + self.feed_forward(self.post_attention_layernorm(x_BTD)), cache


class Decoder(nn.Module):
    """Token ids, with image features at the image-token positions (early fusion), to logits."""

    def __init__(self, config: HerdConfig) -> None:
        super().__init__()
        text = config.text
        self.config = config
        self.embed_tokens = nn.Embedding(text.vocab_size, text.hidden_size)
        self.rotary = DecoderRotary(text)
        self.layers = nn.ModuleList(DecoderLayer(text, layer) for layer in range(text.num_layers))
        self.norm = RMSNorm(text.hidden_size, text.rms_norm_eps)
        if not text.tie_word_embeddings:
            self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)

    def forward(
        self,
        input_ids_BT: Tensor,
        image_features_PD: Tensor | None = None,
        past_lengths_B: Tensor | None = None,
        caches: list[KVCache] | None = None,
        logit_rows_R: Tensor | None = None,
        document_BT: Tensor | None = None,
    ) -> tuple[Tensor, list[KVCache | None]]:
        """Run all layers.

        Args:
            input_ids_BT: token ids.
            image_features_PD: features that fill the image-token positions of ``input_ids_BT`` in order.
            past_lengths_B: tokens already in the caches, 0 without caches.
            caches: one per layer, or None to attend among the given tokens only (training).
            logit_rows_R: positions along T whose logits are wanted, None for all.
            document_BT: int64 ids; tokens of a row that lie beside each other and share one are a document. None for
                rows of one document, and with caches.

        Returns:
            Logits [B, R, V] and the caches after the append.
        """
        if past_lengths_B is None:
            past_lengths_B = torch.zeros(input_ids_BT.shape[0], dtype=torch.int64, device=input_ids_BT.device)
        x_BTD = self.embed(input_ids_BT, image_features_PD)
        assert document_BT is None or caches is None, "a cache holds one document per row"
        positions = self.positions(input_ids_BT.shape[1], past_lengths_B, document_BT)
        presents: list[KVCache | None] = []
        for index, layer in enumerate(self.layers):
            x_BTD, present = layer(x_BTD, positions, caches[index] if caches is not None else None)
            presents.append(present)
        # Before the head, so that a prefill does not compute 200,000 logits for tokens that nobody samples from.
        if logit_rows_R is not None:
            x_BTD = x_BTD.index_select(1, logit_rows_R)
        return self.logits(x_BTD), presents

    def embed(self, input_ids_BT: Tensor, image_features_PD: Tensor | None) -> Tensor:
        """Embeddings of the ids, replaced by image features, in order, where the id is the image token."""
        x_BTD = self.embed_tokens(input_ids_BT)
        if image_features_PD is None:
            return x_BTD
        # A gather and a select instead of masked assignment, whose shape depends on data: it could not be captured.
        is_image_BT = input_ids_BT == self.config.image_token_id
        order_BT = is_image_BT.flatten().to(torch.int64).cumsum(0).view_as(input_ids_BT)
        # A row of zeros before the first stands for "no feature", so that the gather is in range for every token and
        # for P = 0.
        padded = torch.cat((image_features_PD.new_zeros(1, image_features_PD.shape[1]), image_features_PD))
        feature_BTD = functional.embedding(torch.where(is_image_BT, order_BT, 0), padded)
        return torch.where(is_image_BT[..., None], feature_BTD, x_BTD)

    def positions(self, tokens: int, past_lengths_B: Tensor, document_BT: Tensor | None = None) -> Positions:
        """Positions as rotations, and as the temperature 1 + a · ln(1 + floor((p + 1) / f)) of layers without RoPE.

        They count from the start of a row, or of each document with the lengths that keep documents apart.
        """
        text = self.config.text
        positions_BT = past_lengths_B[:, None] + torch.arange(tokens, device=past_lengths_B.device)
        documents = None
        if document_BT is not None:
            positions_BT, documents = document_positions(document_BT), document_lengths(document_BT)
        # p is absolute; the temperature is 1 up to p = f - 2, so that short texts do not show an error in it
        # (llama-models ``model.py``, ``Attention``).
        blocks = torch.floor((positions_BT[..., None].float() + 1.0) / text.floor_scale)
        temperature_BT1 = 1.0 + text.attn_scale * torch.log(1.0 + blocks)
        cos_BTh, sin_BTh = self.rotary(positions_BT)
        return Positions(cos_BTh, sin_BTh, temperature_BT1, past_lengths_B, documents)

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Final norm and head."""
        x_BTD = self.norm(x_BTD)
        tied = self.config.text.tie_word_embeddings
        return functional.linear(x_BTD, self.embed_tokens.weight) if tied else self.lm_head(x_BTD)
