"""Where the model is: a bundle that is loaded here, or a server that --url names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..console import stderr
from ..errors import HerdError
from ..options import PATH
from .answers import check_request, load_engine
from .api_key import api_key
from .attachments import Attachments
from .speaker import LocalSpeaker, Speaker

if TYPE_CHECKING:
    from ..runtimes.executors.options import Memory

_OPTIONS = (
    click.option("--url", metavar="URL", help="Ask a server of OpenAI's form, such as http://localhost:8000, in the "
                                              "place of BUNDLE."),
    click.option("--model", metavar="NAME", show_default="the first that the server lists",
                 help="With --url: the model's name."),
    click.option("--api-key-file", type=PATH, metavar="FILE", show_default="HERDGRAPH_API_KEY, else OPENAI_API_KEY",
                 help="With --url: file with the server's API key."),
)


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
    device: str | None

    def __post_init__(self) -> None:
        if (self.bundle is None) == (self.url is None):
            self._refuse("Give BUNDLE or --url URL, one of them.")
        if self.bundle is not None and (self.model is not None or self.api_key_file is not None):
            self._refuse("--model and --api-key-file belong to --url, not to BUNDLE.")
        if self.url is not None and (self.threads is not None or self.device is not None or _given("memory")):
            self._refuse("--threads, --memory and --device belong to BUNDLE, a server at --url has its own.")

    def _refuse(self, message: str) -> None:
        raise click.UsageError(message, click.get_current_context(silent=True))

    def open(self, *, attachments: Attachments, system: str | None, raw: bool) -> Speaker:
        """Load the bundle, or find the server; what cannot be asked of it is refused before.

        Raises:
            HerdError: as ``check_request``, ``Engine.load`` and ``RemoteServer``.
        """
        check_request(self.bundle, attachments, system=system, raw=raw)
        if self.bundle is not None:
            return LocalSpeaker(load_engine(self.bundle, self.threads, self.memory, self.device))
        if attachments and raw:
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
