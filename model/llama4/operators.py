"""Operators that a target may lower in its own way, each with one eager meaning and one graph symbol.

Shapes: B batch, T tokens, D width, H query heads, G key/value heads, K head dimension, S cache slots, E experts,
F expert width, k chosen experts.

Eagerly these are plain, differentiable torch. While ``torch.export`` traces, each becomes a single node: standard
ONNX where the standard says the same thing (``RMSNormalization``, ``RotaryEmbedding``), domain ``herdgraph``
otherwise (``RoutedExperts``, ``CachedAttention``), whose reference bodies stand in ``export/graph/functions.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

DOMAIN = "herdgraph"
OPSET = 24
"""ONNX opset of every graph: the first with ``TensorScatter``, which writes a key/value cache."""


def _symbolic(name: str, inputs: list[Tensor | None], attributes: Mapping[str, Any], like: Tensor) -> Tensor:
    version = OPSET if "::" not in name else 1
    return torch.onnx.ops.symbolic(name, inputs, dict(attributes), dtype=like.dtype, shape=like.shape, version=version)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis, in float32, cast back *before* the weight is multiplied.

    Args:
        x: any shape ending in the width of ``weight``.
        weight: one factor per element of the last axis.
        eps: added to the mean square.
    """
    if torch.compiler.is_exporting():
        return _symbolic("RMSNormalization", [x, weight], {"axis": -1, "epsilon": eps, "stash_type": 1}, x)
    # The weight multiplies after the cast, in the model's type: in bfloat16 the other order gives other numbers, and
    # the models were trained with this one (llama-models ``RMSNorm``).
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).type_as(x) * weight


def rotary_embedding(x_BTN: Tensor, cos_BTh: Tensor, sin_BTh: Tensor, *, num_heads: int) -> Tensor:
    """Rotate the pairs (2i, 2i+1) of every head, in float32 (Su et al. 2021; llama-models ``apply_rotary_emb``).

    Both Meta's and Hugging Face's Llama 4 checkpoints hold these neighbouring pairs. Llama 3 in transformers rotates
    element i with i + K/2 and stores permuted rows: with that rotation Llama 4's weights give nonsense.

    Args:
        x_BTN: queries or keys, N = heads · K.
        cos_BTh: cosines per position and pair, h = K / 2.
        sin_BTh: sines, same shape.
        num_heads: number of heads in N.
    """
    if torch.compiler.is_exporting():
        attributes = {"interleaved": 1, "num_heads": num_heads}
        return _symbolic("RotaryEmbedding", [x_BTN, cos_BTh, sin_BTh, None], attributes, x_BTN)
    even, odd = x_BTN.float().unflatten(-1, (num_heads, -1, 2)).unbind(-1)
    cos, sin = cos_BTh[..., None, :], sin_BTh[..., None, :]
    rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return rotated.flatten(-3).type_as(x_BTN)


def routed_experts(
    x_TD: Tensor, logits_TE: Tensor, gate_up_ED2F: Tensor, down_EFD: Tensor, *, top_k: int,
    first_expert: int | None = None,
) -> Tensor:
    """Send every token to the experts with its highest logits; the sigmoid of a logit scales the expert's *input*.

    y = sum over the chosen e of  down_e( silu(gate_e(s_e x)) * up_e(s_e x) ),  s_e = sigmoid(logit_e)

    silu is not homogeneous, so weighting the output instead is another function (llama-models ``moe.py``). Gradients
    reach the router through s; the reference detaches it because it only infers.

    Args:
        x_TD: tokens.
        logits_TE: router logits.
        gate_up_ED2F: per expert, gate columns first, then up.
        down_EFD: per expert.
        top_k: experts per token.
        first_expert: the weights are those of a range of the experts that begins here, and what a token owes to others
            is left out: one rank's part of the sum. None when they are all.
    """
    if torch.compiler.is_exporting():
        inputs: list[Tensor | None] = [x_TD, logits_TE, gate_up_ED2F, down_EFD]
        attributes = {"top_k": top_k} | ({} if first_expert is None else {"first_expert": first_expert})
        return _symbolic(f"{DOMAIN}::RoutedExperts", inputs, attributes, x_TD)
    # 1. Choose by logit, and weight by the sigmoid of the chosen logit alone: no softmax, and nothing that makes the
    #    weights of several chosen experts add up to one (llama-models ``moe.py``).
    logits_Tk, experts_Tk = logits_TE.topk(top_k, dim=-1)
    # 2. Scale the input. Runtimes' ready-made mixtures scale the output, which is not the same (see above).
    scaled_TkD = x_TD[:, None] * torch.sigmoid(logits_Tk.float()).type_as(x_TD)[..., None]
    # 3. Run every expert on its own tokens, and add what it gives to theirs.
    y_TD = torch.zeros_like(x_TD)
    for expert in range(gate_up_ED2F.shape[0]):
        token, choice = torch.where(experts_Tk == expert + (first_expert or 0))
        gate, up = (scaled_TkD[token, choice] @ gate_up_ED2F[expert]).chunk(2, dim=-1)
        found_tD = (functional.silu(gate) * up) @ down_EFD[expert]
        y_TD = y_TD.index_add(0, token, found_tD.type_as(y_TD))  # products have another type under autocast
    return y_TD


def cached_attention(
    q_BTN: Tensor,
    k_BTM: Tensor,
    v_BTM: Tensor,
    past_k_BGSK: Tensor,
    past_v_BGSK: Tensor,
    past_lengths_B: Tensor,
    *,
    num_heads: int,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Append keys and values to a cache and attend to what is visible in it.

    The new tokens of a sequence that already holds L take slots ``L % chunk ...`` (``L ...`` when chunk is 0), and
    query t sees the slots up to its own. For chunked layers that is causal attention inside the block of ``chunk``
    tokens, provided that one call does not cross a multiple of ``chunk``; the caller splits there.

    Args:
        q_BTN: queries, N = H · K.
        k_BTM: keys, M = G · K, already rotated and normalised.
        v_BTM: values.
        past_k_BGSK: cache of keys; slots from the visible length on hold anything.
        past_v_BGSK: cache of values.
        past_lengths_B: tokens each sequence already holds.
        num_heads: H.
        chunk: slots of a chunked layer, 0 for a layer that sees its whole past.

    Returns:
        The attention output [B, T, N] and both caches after the append.
    """
    (batch, groups, slots, width), tokens = past_k_BGSK.shape, q_BTN.shape[1]
    if torch.compiler.is_exporting():
        y, present_k, present_v = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::CachedAttention",
            [q_BTN, k_BTM, v_BTM, past_k_BGSK, past_v_BGSK, past_lengths_B],
            {"num_heads": num_heads, "kv_heads": groups, "chunk": chunk},
            dtypes=[q_BTN.dtype, past_k_BGSK.dtype, past_v_BGSK.dtype],
            shapes=[q_BTN.shape, past_k_BGSK.shape, past_v_BGSK.shape],
            version=1,
        )
        return y, present_k, present_v
    # 1. Slots of the new tokens. A chunk begins at slot 0 again and overwrites the one before it, so that chunked
    #    attention needs no policy of eviction.
    first_B = past_lengths_B % chunk if chunk else past_lengths_B
    slot_BT = first_B[:, None] + torch.arange(tokens, device=q_BTN.device)
    # 2. Append.
    index = slot_BT[:, None, :, None].expand(batch, groups, tokens, width)
    present_k = past_k_BGSK.scatter(2, index, _heads(k_BTM, groups))
    present_v = past_v_BGSK.scatter(2, index, _heads(v_BTM, groups))
    # 3. Attend. Slots above a query's own are later tokens or what the chunk before has left: neither is visible.
    visible_BTS = torch.arange(slots, device=q_BTN.device) <= slot_BT[..., None]
    return _attend(_heads(q_BTN, num_heads), present_k, present_v, visible_BTS[:, None]), present_k, present_v


def full_sequence_attention(
    q_BTN: Tensor,
    k_BTM: Tensor,
    v_BTM: Tensor,
    *,
    num_heads: int,
    kv_heads: int,
    chunk: int,
    documents: Sequence[int] | None = None,
) -> Tensor:
    """Attention over whole sequences that start at position 0, without a cache: what training uses.

    A token sees itself and the tokens before it in its document, in its block of ``chunk`` tokens when ``chunk`` is not
    0. Both make segments, and attention is causal within each: so each is attended to by itself, and no mask is built
    that would say of every pair of tokens of a row whether they see each other. Segments of one length that lie beside
    each other, as the blocks of a long document do, are computed together. Shapes as in ``cached_attention``.

    Args:
        q_BTN: queries.
        k_BTM: keys.
        v_BTM: values.
        num_heads: H.
        kv_heads: G.
        chunk: attention chunk of the layer in tokens, 0 for a layer that sees its whole past.
        documents: lengths of the documents of all rows, one row after the other; None when every row is one document.
    """
    batch, tokens = q_BTN.shape[:2]
    lengths = causal_segments([tokens] * batch if documents is None else documents, chunk)
    runs = [(length, len(list(same))) for length, same in groupby(lengths)]
    parts = [x.flatten(0, 1).split([length * count for length, count in runs]) for x in (q_BTN, k_BTM, v_BTM)]
    found = []
    for (length, count), q_RN, k_RM, v_RM in zip(runs, *parts, strict=True):
        q, k, v = (_heads(x.unflatten(0, (count, length)), heads)
                   for x, heads in ((q_RN, num_heads), (k_RM, kv_heads), (v_RM, kv_heads)))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        found.append(_joined(y).flatten(0, 1))
    return torch.cat(found).unflatten(0, (batch, tokens))


def causal_segments(documents: Sequence[int], chunk: int) -> list[int]:
    """Lengths of the parts of documents in which attention is causal: their blocks of ``chunk`` tokens, or all."""
    return [min(chunk or length, length - start) for length in documents for start in range(0, length, chunk or length)]


def document_positions(document_BT: Tensor) -> Tensor:
    """Positions that restart where the document changes, int64 [B, T].

    A document is a run of equal ids along a row: an id that comes back after another one is a document of its own.
    """
    row_T = torch.arange(document_BT.shape[1], device=document_BT.device)
    # roll compares the first column with the last. What comes out there does not matter: its position is 0 either way.
    begins_BT = document_BT != document_BT.roll(1, dims=1)
    return row_T - torch.where(begins_BT, row_T, 0).cummax(dim=1).values


def document_lengths(document_BT: Tensor) -> list[int]:
    """Lengths of the documents of all rows, one row after the other; waits for the device."""
    ends_BT = document_BT != document_BT.roll(-1, dims=1)
    ends_BT[:, -1] = True
    ends = ends_BT.flatten().nonzero().flatten().tolist()
    return [end - before for before, end in pairwise([-1, *ends])]


def _heads(x_BTN: Tensor, heads: int) -> Tensor:
    return x_BTN.unflatten(-1, (heads, -1)).transpose(1, 2)


def _attend(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, visible: Tensor) -> Tensor:
    return _joined(functional.scaled_dot_product_attention(q_BHTK, k_BGSK, v_BGSK, attn_mask=visible, enable_gqa=True))


def _joined(y_BHTK: Tensor) -> Tensor:
    return y_BHTK.transpose(1, 2).flatten(2)
