"""Fidelity, measured: a bundle's logits against the torch model of the checkpoint it came from.

For each position t with reference distribution p and the bundle's q:  KL_t = sum_v p_v (ln p_v - ln q_v).
What a healthy bundle may differ by depends on its recipe: ``bounds.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from ..errors import HerdError
from ..model.config import HerdConfig
from ..model.llama4.model import Llama4

Array = np.ndarray[Any, Any]


class LogitsSource(Protocol):
    """What is compared: ``runtimes.Engine`` or anything that prefills and decodes like it."""

    def new_sequence(self) -> Any:
        """An empty sequence."""

    def prefill(self, sequence: Any, token_ids: Sequence[int], pixel_values: Array | None = None, *,
                all_positions: bool = False) -> Array:
        """Logits of appended tokens."""

    def decode(self, sequence: Any, token_id: int) -> Array:
        """Logits of one appended token."""


@dataclass(frozen=True)
class Fidelity:
    """How far logits are from the reference.

    Attributes:
        tokens: positions compared.
        max_difference: largest absolute logit difference.
        mean_difference: mean absolute logit difference.
        logit_std: standard deviation of the reference logits, the scale of the differences.
        top1_agreement: share of positions with the same most likely token.
        mean_kl: mean KL(reference || bundle) in nats.
        max_kl: largest KL of a position.
        decode_difference: largest difference when the last tokens are decoded one at a time.
        decode_kl: mean KL of these from the bundle's own logits of the whole prompt, in nats.
    """

    tokens: int
    max_difference: float
    mean_difference: float
    logit_std: float
    top1_agreement: float
    mean_kl: float
    max_kl: float
    decode_difference: float
    decode_kl: float = 0.0

    def to_json(self) -> dict[str, float]:
        """Plain dictionary."""
        return asdict(self)


def random_prompt(config: HerdConfig, tokens: int, *, images: int = 0, seed: int = 0) -> tuple[list[int], Array | None]:
    """Random text tokens with ``images`` one-tile images of noise at the front.

    Raises:
        HerdError: they are more than the context.
    """
    image_tokens = images * config.vision.tokens_per_tile if config.vision else 0
    if tokens + image_tokens > config.text.max_position_embeddings:
        raise HerdError(f"{tokens} random tokens and {image_tokens} of images are more than the context of "
                        f"{config.text.max_position_embeddings}: compare fewer")
    random = np.random.default_rng(seed)
    ids = random.integers(0, config.text.vocab_size, tokens)
    ids[ids == config.image_token_id] = 0
    if config.vision is None or not images:
        return ids.tolist(), None
    shape = (images, config.vision.num_channels, config.vision.image_size, config.vision.image_size)
    pixels = random.normal(size=shape).astype(np.float32)
    return [config.image_token_id] * image_tokens + ids.tolist(), pixels


def compare(
    engine: LogitsSource, model: Llama4, token_ids: Sequence[int], pixel_values: Array | None = None, *,
    decode_tokens: int = 8,
) -> Fidelity:
    """Compare a bundle with the torch model on one prompt.

    The torch model sees the whole prompt at once, without any cache. The engine prefills it in one call, and a second
    time with the last ``decode_tokens`` text tokens one by one.
    """
    with torch.inference_mode():
        pixels = None if pixel_values is None else torch.from_numpy(pixel_values)
        reference = model(torch.tensor([list(token_ids)]), pixels)[0].float().numpy()
    found = engine.prefill(engine.new_sequence(), token_ids, pixel_values, all_positions=True)
    steps = min(decode_tokens, _trailing_text(model.config, token_ids), len(token_ids) - 1)
    sequence, split = engine.new_sequence(), len(token_ids) - steps
    engine.prefill(sequence, token_ids[:split], pixel_values)
    decoded = [engine.decode(sequence, token) for token in token_ids[split:]]
    if not decoded:
        return fidelity(reference, found)
    one_by_one = np.stack(decoded)
    return replace(fidelity(reference, found),
                   decode_difference=float(np.abs(one_by_one - reference[split:]).max()),
                   decode_kl=float(kl_divergence(found[split:], one_by_one).mean()))


def fidelity(reference_TV: Array, found_TV: Array) -> Fidelity:
    """Statistics of two sets of logits, float32 [T, V] each; nothing is said of decoding."""
    kl_T = kl_divergence(reference_TV, found_TV)
    gap = np.abs(reference_TV - found_TV)
    return Fidelity(
        tokens=len(reference_TV),
        max_difference=float(gap.max()),
        mean_difference=float(gap.mean()),
        logit_std=float(reference_TV.std()),
        top1_agreement=float((reference_TV.argmax(-1) == found_TV.argmax(-1)).mean()),
        mean_kl=float(kl_T.mean()),
        max_kl=float(kl_T.max()),
        decode_difference=0.0,
    )


def kl_divergence(reference_TV: Array, found_TV: Array) -> Array:
    """KL(reference || found) of each position in nats, float64 [T]."""
    p, q = (torch.from_numpy(x).double().log_softmax(-1) for x in (reference_TV, found_TV))
    return (p.exp() * (p - q)).sum(-1).clamp(min=0).numpy()


def _trailing_text(config: HerdConfig, token_ids: Sequence[int]) -> int:
    """Number of text tokens at the end: only those can be decoded one by one."""
    if config.vision is None:
        return len(token_ids)
    after = [at for at, token in enumerate(token_ids) if token == config.image_token_id]
    return len(token_ids) - (after[-1] + 1 if after else 0)
