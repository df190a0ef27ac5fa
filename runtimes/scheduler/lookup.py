"""Where the last few tokens of a text stood before in it."""

from __future__ import annotations

from collections.abc import Sequence as Items


class NGramIndex:
    """The latest place of every short token sequence of one text, which grows.

    Args:
        shortest: fewest tokens of a sequence.
        longest: most.
    """

    def __init__(self, shortest: int = 2, longest: int = 4) -> None:
        self._lengths = range(longest, shortest - 1, -1)
        self._ends: dict[tuple[int, ...], int] = {}
        self._indexed = 0

    def following(self, token_ids: Items[int], count: int) -> list[int]:
        """What followed the last tokens where they stood before, at most ``count`` tokens; the longest match counts."""
        self._index(token_ids)
        for length in self._lengths:
            end = self._ends.get(tuple(token_ids[-length:])) if len(token_ids) >= length else None
            if end is not None:
                return list(token_ids[end : end + count])
        return []

    def _index(self, token_ids: Items[int]) -> None:
        """Take in all sequences that end before the last token."""
        for end in range(max(1, self._indexed), len(token_ids)):
            for length in self._lengths:
                if length <= end:
                    self._ends[tuple(token_ids[end - length : end])] = end
        self._indexed = len(token_ids)
