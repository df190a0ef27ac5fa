"""Who answers, wherever the model is: what chats and single prompts ask of it, and a bundle in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from ..model.processing import FrameSampling, GenerationDefaults
    from ..runtimes import Engine, Generation, TextStream


class Answer(Protocol):
    """Text deltas; ``result`` is complete once they end."""

    result: Generation

    def __iter__(self) -> Iterator[str]:
        """Deltas, as they come."""


class Speaker(Protocol):
    """What chats and single prompts ask of a model, wherever it is."""

    @property
    def context(self) -> int | None:
        """Tokens of a prompt and its answer, None where that is unknown."""

    @property
    def generation_defaults(self) -> GenerationDefaults | None:
        """What holds for options that are not given, None where that is unknown."""

    def prepare(self, prompt: Any) -> object:
        """Refuse a prompt that could not be answered, before a person has typed one."""

    def picture(self, path: Path) -> Any:
        """What stands for a picture in messages."""

    def video(self, path: Path, sampling: FrameSampling | None) -> Any:
        """What stands for a video in messages."""

    def stream(self, prompt: Any, **options: Any) -> Answer:
        """Answer; options are those of ``Engine.stream``."""

    def stopped_by(self, stopped: Callable[[], bool]) -> AbstractContextManager[None]:
        """Let answers end when ``stopped`` says so, by ``StoppedError`` where that is in the middle of something."""


class LocalSpeaker:
    """An engine in this process; what its sequence holds is not computed again in the next turn."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._sequence = engine, engine.new_sequence()

    @property
    def context(self) -> int:
        """Of the model."""
        return self._engine.config.text.max_position_embeddings

    @property
    def generation_defaults(self) -> GenerationDefaults:
        """Of the checkpoint."""
        return self._engine.processor.generation_defaults

    def prepare(self, prompt: Any) -> object:
        """Refuse what the tokenizer or the chat template cannot say."""
        return self._engine.processor.prepare(prompt)

    def picture(self, path: Path) -> Any:
        """The picture, decoded; refused where the model reads text only."""
        from ..model.processing.pictures import load_image

        assert self._engine.processor.image_processor, "models without images were refused"
        return load_image(path)

    def video(self, path: Path, sampling: FrameSampling | None) -> Any:
        """The frames of a video; refused where the model reads text only."""
        from ..model.processing import load_video

        assert self._engine.processor.image_processor, "models without images were refused"
        return load_video(path, sampling)

    def stream(self, prompt: Any, **options: Any) -> TextStream:
        """Answer."""
        return self._engine.stream(prompt, sequence=self._sequence, **options)

    def stopped_by(self, stopped: Callable[[], bool]) -> AbstractContextManager[None]:
        """Look at ``stopped`` between two chunks of a prompt."""
        return self._sequence.stopped_by(stopped)
