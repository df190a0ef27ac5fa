"""How far the logits of a healthy bundle may be from the torch model, by recipe. Torch-free.

fp32 computes what the reference computes: its largest logit difference is rounding. A quantised bundle has large
differences at few tokens and says nearly the same, so it is judged by the mean KL divergence and by how often the most
likely token is the same. Measured on the calf, 128 random tokens after a picture of noise, seeds 0 to 5:

========  ==================  ==================  =======================  =======================
recipe    mean KL (nats)      same top token      bound of the KL          bound of the top token
========  ==================  ==================  =======================  =======================
fp32      2e-12               100 %               (1e-3 of a logit)
int8      0.0009 to 0.011     96 to 100 %         0.02                     90 %
int4      0.022 to 0.052      81 to 90 %          0.08                     75 %
fp8       0.010 to 0.039      88 to 96 %          0.08                     80 %
========  ==================  ==================  =======================  =======================

int4 was not calibrated, which is the worse case. Broken bundles, one tensor of layer 1 or 3 at fault: in int8 a scale
twice too large gave a KL of 0.065 to 0.57 and 44 to 86 % of the top tokens, experts in another order 0.14 and 0.30 and
65 to 74 %; in int4 the least of four was 0.11 and 76 %. A factor on the queries or keys of a model that normalises them
changes nothing, and is not found. With 8-bit caches, decoding one by one differed from the whole prompt by a KL of at
most 0.0008 (an earlier calf); it is held to the same bound. bf16 has the bounds of int8: no GPU has run one yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Bounds:
    """What passes; None is not judged.

    Attributes:
        difference: largest absolute logit difference.
        kl: mean KL divergence in nats, of the whole prompt and of tokens decoded one by one.
        top1: share of positions with the same most likely token, at least.
    """

    difference: float | None = None
    kl: float | None = None
    top1: float | None = None

    def broken(self, measured: Mapping[str, float]) -> Iterator[str]:
        """What does not pass, in words.

        Args:
            measured: the fields of ``verify.Fidelity``.
        """
        largest = max(measured["max_difference"], measured["decode_difference"])
        if self.difference is not None and not largest <= self.difference:
            yield f"the largest logit difference is {largest:.3g}, the bound is {self.difference:.3g}"
        if self.kl is not None and not measured["mean_kl"] <= self.kl:
            yield f"the mean KL divergence is {measured['mean_kl']:.3g} nats, the bound is {self.kl:.3g}"
        if self.kl is not None and not measured["decode_kl"] <= self.kl:
            yield f"decoding one by one differs by a KL of {measured['decode_kl']:.3g} nats, the bound is {self.kl:.3g}"
        if self.top1 is not None and not measured["top1_agreement"] >= self.top1:
            yield f"{measured['top1_agreement']:.1%} of the top tokens are the same, the bound is {self.top1:.1%}"


BOUNDS = {
    "fp32": Bounds(difference=1e-3),
    "bf16": Bounds(kl=0.02, top1=0.9),
    "int8": Bounds(kl=0.02, top1=0.9),
    "int4": Bounds(kl=0.08, top1=0.75),
    "fp8": Bounds(kl=0.08, top1=0.8),
}
"""By the name of the recipe."""
