"""What an application asks of an engine, in its own words, checked and in tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any

from ...model.config import HerdConfig
from ...model.processing import PreparedPrompt, Prompt, PromptProcessor
from ...model.processing.pictures import Source
from .sampling import Sampling
from .stop_strings import StopRule


@dataclass(frozen=True)
class Asked:
    """A prompt and how it is to be answered.

    Attributes:
        prompt: its tokens and tiles.
        sampling: how tokens are chosen.
        stop: when the answer ends.
        never: tokens that are not chosen, since they mean nothing in an answer.
    """

    prompt: PreparedPrompt
    sampling: Sampling
    stop: StopRule
    never: tuple[int, ...]

    @classmethod
    def of(
        cls, processor: PromptProcessor, config: HerdConfig, prompt: Prompt, *, max_new_tokens: int = 256,
        stop: str | Items[str] = (), stop_ids: Iterable[int] | None = None, images: Items[Source] | None = None,
        tools: Items[Mapping[str, Any]] | None = None, **sampling: Any,
    ) -> Asked:
        """Arguments and errors as in ``Engine.stream``."""
        chosen = Sampling.of(processor.generation_defaults, **sampling)
        prepared = processor.prepare(prompt, images=images, tools=tools)
        rule = StopRule.of(max_new_tokens, stop, processor.tokenizer.stop_ids if stop_ids is None else stop_ids)
        left = config.text.max_position_embeddings - len(prepared.token_ids)
        return cls(prepared, chosen, rule.within(left), (config.image_token_id,) if config.vision else ())
