"""What a sequence has computed already of a new prompt."""

from __future__ import annotations

from ...model.config import HerdConfig
from ...model.processing import PreparedPrompt
from ..kv_cache.sequence import Sequence, tile_digest


def shared_prefix(sequence: Sequence, prompt: PreparedPrompt, config: HerdConfig) -> int:
    """Tokens at the beginning of a prompt that a sequence holds: same ids, same pictures, whole tiles.

    At least one token of the prompt is left to compute, for its logits.
    """
    # 1. The same ids.
    old, new = sequence.token_ids, prompt.token_ids
    limit = min(len(old), len(new) - 1)
    shared = next((at for at in range(limit) if old[at] != new[at]), limit)
    if config.vision is None or prompt.pixel_values is None:
        return shared
    # 2. The same pictures: the shared tokens end before the first tile with other pixels.
    tiles = [tile_digest(tile) for tile in prompt.pixel_values]
    pairs = zip(sequence.tile_digests, tiles, strict=False)
    same = next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(tiles), len(sequence.tile_digests)))
    # 3. Whole tiles: one that is cut off, by the limit or by its pixels, is computed again from its first token.
    places = [at for at, token in enumerate(new[:shared]) if token == config.image_token_id]
    per_tile = config.vision.tokens_per_tile
    whole = min(same, len(places) // per_tile)
    return places[whole * per_tile] if whole * per_tile < len(places) else shared
