"""Pictures and their names drawn together: how an image tower begins before it is fused.

Llama 4's tower came from MetaCLIP and was trained apart from the herd first. Learning to see from next tokens alone is
slow: a name is a few tokens, and most of them follow from the first. So pictures meet names directly (CLIP, Radford et
al. 2021, arXiv 2103.00020). For n pairs in a batch, with cosines c_ij of picture i and name j and a temperature t,

    L = - 1/2 · mean_i [ log sum_{j like i} softmax_j(c_ij / t)  +  log sum_{j like i} softmax_j(c_ji / t) ]

where "j like i" are the pairs of the same name. A picture is the mean of its features after the projector, a name the
mean of its tokens' embeddings, both less the batch's mean: so features end up where the decoder already has the words.

Shapes: n pairs, P tiles of a document, D decoder width, L tokens of a name.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import HerdError
from ..llama4.model import Llama4
from .data import Batch
from .distill import documents
from .objective import labelled

TEMPERATURE = 0.05


class ContrastiveLoss:
    """An objective: each document of a batch that has one tile and a text is a pair."""

    def __call__(self, model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, float]]:
        """See ``Objective``: the mean over pairs, times the labelled tokens that the trainer divides by."""
        assert isinstance(model, Llama4), "only a herd member has an image tower"
        assert model.vision is not None, "the recipe refuses models without one"
        pairs = [document for document in documents(batch, model.config)
                 if document.tiles_PCHW is not None and len(document.tiles_PCHW) == 1]
        if len(pairs) < 2:
            raise HerdError(f"the batch has {len(pairs)} pairs of one picture and a text, at least 2 are needed: give "
                            "pairs, and more rows")
        tiles_nCHW = torch.cat([pair.tiles_PCHW for pair in pairs if pair.tiles_PCHW is not None])
        features_nD = model.vision(tiles_nCHW).unflatten(0, (len(pairs), -1)).mean(1)
        names = [pair.labels_L[pair.learned] for pair in pairs]
        words_nD = torch.stack([model.decoder.embed_tokens(ids_L).mean(0) for ids_L in names])
        like_nn = torch.tensor([[torch.equal(a, b) for b in names] for a in names])
        cosines_nn = _directions(features_nD.float()) @ _directions(words_nD.float()).T
        loss, found = contrastive_loss(cosines_nn / TEMPERATURE, like_nn.to(cosines_nn.device))
        return loss * labelled(batch), {"pairs": float(len(pairs)), "found": found}


def contrastive_loss(logits_nn: Tensor, like_nn: Tensor) -> tuple[Tensor, float]:
    """The loss above, and the share of pictures whose most likely name is theirs.

    Args:
        logits_nn: cosines over the temperature, pictures along the rows.
        like_nn: bool, whether the pairs have the same name.
    """
    others_nn = logits_nn.masked_fill(~like_nn, -torch.inf)
    both = [(others_nn.logsumexp(axis) - logits_nn.logsumexp(axis)).mean() for axis in (0, 1)]
    found = like_nn.gather(1, logits_nn.argmax(1, keepdim=True)).float().mean()
    return -(both[0] + both[1]) / 2, float(found)


def _directions(x_nD: Tensor) -> Tensor:
    """Unit vectors from the batch's mean."""
    return functional.normalize(x_nD - x_nD.mean(0), dim=-1)
