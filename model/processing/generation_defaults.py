"""How a checkpoint's authors want it sampled: ``generation_config.json``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import HerdError
from ...reading import read_optional_json

_MOST_STOPS = 1024


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """Values of ``generation_config.json``, None where it says nothing.

    Attributes:
        temperature: divides the logits; None, which is greedy, also where the file says ``do_sample: false``; 1 where
            it says ``do_sample: true`` and no temperature.
        top_p: share of the probability that is kept.
        top_k: tokens that are kept.
        min_p: tokens below this share of the likeliest are dropped.
        repetition_penalty: divides the logits of tokens that were there already; 1 is none.
        eos_ids: tokens that end a generation.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    eos_ids: tuple[int, ...] = ()

    @classmethod
    def from_directory(cls, directory: Path) -> GenerationDefaults:
        """The defaults of a checkpoint or bundle; without the file there are none.

        Raises:
            HerdError: a value is of the wrong kind or impossible.
        """
        path = directory / "generation_config.json"
        found = _Values(path, read_optional_json(path))
        return cls(
            temperature=found.temperature(),
            top_p=found.number("top_p", 0, 1),
            top_k=found.whole("top_k"),
            min_p=found.number("min_p", 0, 1),
            repetition_penalty=found.number("repetition_penalty", 1e-6, math.inf),
            eos_ids=found.ids("eos_token_id"),
        )


class _Values:
    """The file's content, read key by key."""

    def __init__(self, path: Path, raw: dict[str, Any]) -> None:
        self.path, self.raw = path, raw

    def temperature(self) -> float | None:
        samples, value = self.raw.get("do_sample"), self.number("temperature", 0, math.inf)
        if samples is not None and not isinstance(samples, bool):
            self.refuse("do_sample", "true or false")
        if samples is False:
            return None
        return 1.0 if samples and value is None else value

    def number(self, name: str, least: float, most: float) -> float | None:
        value = self.raw.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
            self.refuse(name, f"a number within {least:g} and {most:g}")
        return float(value) if math.isfinite(value) else self.refuse(name, "a finite number")

    def whole(self, name: str) -> int | None:
        value = self.raw.get(name)
        return None if value is None else value if _is_whole(value) else self.refuse(name, "a whole number from 0 on")

    def ids(self, name: str) -> tuple[int, ...]:
        value = self.raw.get(name)
        listed = value if isinstance(value, list) else [] if value is None else [value]
        if len(listed) > _MOST_STOPS or not all(map(_is_whole, listed)):
            self.refuse(name, f"a token id or a list of at most {_MOST_STOPS}")
        return tuple(listed)

    def refuse(self, name: str, needed: str) -> Any:
        raise HerdError(f"{self.path} has {name} {self.raw[name]!r:.80}, {needed} is needed: get the file again")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
