"""Who answers: a bundle that is loaded here, or the model of a server that --url names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import click

from ..console import stderr
from ..errors import HerdError
from ..options import PATH
from .answers import check_request, load_engine
from .api_key import api_key

if TYPE_CHECKING:
    from ..model.processing.generation_defaults import GenerationDefaults
    from ..runtimes import Engine, Generation, TextStream
    from ..runtimes.executors.options import Memory

_OPTIONS = (
    click.option("--url", metavar="URL", help="Ask a server of OpenAI's form, such as http://localhost:8000, in the "
                                              "place of BUNDLE."),
    click.option("--model", metavar="NAME", show_default="the first that the server lists",
                 help="With --url: the model's name."),
    click.option("--api-key-file", type=PATH, metavar="FILE", show_default="HERDGRAPH_API_KEY, else OPENAI_API_KEY",
                 help="With --url: file with the server's API key."),
)


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

    def stream(self, prompt: Any, **options: Any) -> TextStream:
        """Answer."""
        return self._engine.stream(prompt, sequence=self._sequence, **options)

    def stopped_by(self, stopped: Callable[[], bool]) -> AbstractContextManager[None]:
        """Look at ``stopped`` between two chunks of a prompt."""
        return self._sequence.stopped_by(stopped)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the model is, by the options of the commands that take BUNDLE or --url.

    Raises:
        click.UsageError: it is neither or both, or an option belongs to the other.
    """

    bundle: Path | None
    url: str | None
    model: str | None
    api_key_file: Path | None
    threads: int | None
    memory: Memory

    def __post_init__(self) -> None:
        if (self.bundle is None) == (self.url is None):
            self._refuse("Give BUNDLE or --url URL, one of them.")
        if self.bundle is not None and (self.model is not None or self.api_key_file is not None):
            self._refuse("--model and --api-key-file belong to --url, not to BUNDLE.")
        if self.url is not None and (self.threads is not None or _given("memory")):
            self._refuse("--threads and --memory belong to BUNDLE, a server at --url has its own.")

    def _refuse(self, message: str) -> None:
        raise click.UsageError(message, click.get_current_context(silent=True))

    def open(self, *, images: Sequence[Path], system: str | None, raw: bool) -> Speaker:
        """Load the bundle, or find the server; what cannot be asked of it is refused before.

        Raises:
            HerdError: as ``check_request``, ``Engine.load`` and ``RemoteServer``.
        """
        check_request(self.bundle, images, system=system, raw=raw)
        if self.bundle is not None:
            return LocalSpeaker(load_engine(self.bundle, self.threads, self.memory))
        if images and raw:
            raise HerdError("--raw with --url sends a text only: leave --image or --raw out")
        return self._server()

    def _server(self) -> Speaker:
        from ..runtimes.client import Address, RemoteServer

        address = Address.of(self.url or "")
        with stderr.status("asking the server"):
            return RemoteServer(address, model=self.model, key=api_key(self.api_key_file))


def _given(name: str) -> bool:
    """Whether an option stands on the command line."""
    context = click.get_current_context(silent=True)
    return bool(context and context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE)


def source_options(command: Any) -> Any:
    """Add ``--url`` and what belongs to it."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
