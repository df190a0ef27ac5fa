"""What may be appended to a sequence: tokens of the vocabulary, within the context, with the images they stand for."""

from __future__ import annotations

from collections.abc import Sequence as Items

from ..errors import HerdError
from ..model.config import HerdConfig
from .kv_cache.sequence import Sequence


def check_tokens(config: HerdConfig, sequence: Sequence, token_ids: Items[int]) -> None:
    """Refuse tokens that a sequence cannot grow by.

    Raises:
        HerdError: no tokens, an id outside of the vocabulary, or more tokens than the context holds.
    """
    text = config.text
    if not token_ids:
        raise HerdError("no tokens were given, at least one is needed")
    wrong = next((token for token in token_ids if not 0 <= token < text.vocab_size), None)
    if wrong is not None:
        raise HerdError(f"token id {wrong} is outside of the vocabulary of {text.vocab_size}")
    total = len(sequence) + len(token_ids)
    if total > text.max_position_embeddings:
        raise HerdError(f"{total} tokens are more than the context of {text.max_position_embeddings}")


def check_batch(config: HerdConfig, sequences: Items[Sequence], token_ids: Items[int]) -> None:
    """Refuse what cannot be one text token for each of several sequences.

    Raises:
        HerdError: no sequence, one given twice, another number of tokens, or a token that cannot be appended.
    """
    if len(sequences) != len(token_ids) or not sequences:
        raise HerdError(f"{len(sequences)} sequences were given {len(token_ids)} tokens, give one token to each")
    if len({id(sequence) for sequence in sequences}) < len(sequences):
        raise HerdError("a sequence was given twice in one batch: fork it")
    for sequence, token in zip(sequences, token_ids, strict=True):
        check_tokens(config, sequence, [token])
        check_images(config, [token])


def check_images(config: HerdConfig, token_ids: Items[int], tiles: int = 0) -> None:
    """Refuse image tokens that are not as many as the tiles' features.

    Raises:
        HerdError: they are not, or the model reads text only.
    """
    if tiles and config.vision is None:
        raise HerdError("this model reads text only, images were given")
    per_tile = config.vision.tokens_per_tile if config.vision else 0
    wanted = token_ids.count(config.image_token_id) if config.vision else 0
    if tiles * per_tile != wanted:
        raise HerdError(f"{tiles} image tiles fill {tiles * per_tile} image tokens, the prompt has {wanted}")
