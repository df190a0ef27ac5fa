"""A model on a server, asked as an engine is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

from ...errors import HerdError
from ...model.processing import FrameSampling, Prompt
from .address import Address
from .bodies import chat_body, completion_body, data_url, video_url
from .connection import Connection
from .failures import RefusedError
from .stream import RemoteStream

_TELL_IDS = ("herdgraph", "vllm")
"""Owners of models, as their servers say it, that tell token ids when asked; others may refuse the question."""
_OTHERWISE = {"llamacpp": {"repetition_penalty": "repeat_penalty"}}
"""Fields that a server, which ignores what it does not know, calls otherwise than vLLM and this project do."""


class RemoteServer:
    """One model of a server.

    Args:
        address: of the server.
        model: its name, None for the first that the server lists.
        key: that is sent along, None for none.

    Raises:
        HerdError: the server cannot be reached or refuses, or serves nothing.
    """

    def __init__(self, address: Address, *, model: str | None = None, key: str | None = None) -> None:
        self._connection = Connection(address, key)
        cards = self._cards(named=model is not None)
        if not cards and model is None:
            raise HerdError(f"{address} lists no model: name one")
        self._card = next((card for card in cards if model in (None, card["id"])), {})
        self.model: str = model or self._card["id"]
        self._stopped: Callable[[], bool] = lambda: False

    @property
    def context(self) -> int | None:
        """Tokens of a prompt and its answer, None where the server does not say it."""
        meta = self._card.get("meta")  # llama.cpp's
        found = self._card.get("max_model_len", meta.get("n_ctx") if isinstance(meta, Mapping) else None)
        return found if isinstance(found, int) else None

    @property
    def generation_defaults(self) -> None:
        """What holds for options that are not given: only the server knows."""

    def prepare(self, prompt: Prompt) -> None:
        """Nothing: whether it can be asked, the server will say."""

    def picture(self, path: Path) -> str:
        """A picture for a message.

        Raises:
            HerdError: it cannot be read, is no picture, or the model reads text only.
        """
        self._require_sight()
        return data_url(path)

    def video(self, path: Path, sampling: FrameSampling | None) -> dict[str, Any]:
        """A video for a message: its URL, and which frames are to be looked at where that is not the default.

        Raises:
            HerdError: it cannot be read, is no video, or the model reads text only.
        """
        self._require_sight()
        return {"url": video_url(path), **(sampling.fields() if sampling else {})}

    def _require_sight(self) -> None:
        if self._card.get("modalities") == ["text"]:
            raise HerdError(f"the model {self.model} reads text only, images were given")

    def stream(self, prompt: Prompt, **options: Any) -> RemoteStream:
        """Answer messages, or continue a text; options are those of ``Engine.stream``.

        Errors are those of ``Connection.stream``, when the stream is read.
        """
        raw = isinstance(prompt, str)
        body = (completion_body if raw else chat_body)(prompt, options)
        for name, other in _OTHERWISE.get(self._owner, {}).items():
            if name in body:
                body[other] = body.pop(name)
        if self._owner in _TELL_IDS:
            body["return_token_ids"] = True
        body |= {"model": self.model, "stream": True, "stream_options": {"include_usage": True}}
        path = "/completions" if raw else "/chat/completions"
        return RemoteStream(lambda: self._connection.stream(path, body, self._stopped))

    @contextmanager
    def stopped_by(self, stopped: Callable[[], bool]) -> Iterator[None]:
        """Let answers end early: where ``stopped`` is true, the connection is closed and ``StoppedError`` raised."""
        before, self._stopped = self._stopped, stopped
        try:
            yield
        finally:
            self._stopped = before

    @property
    def _owner(self) -> str:
        return str(self._card.get("owned_by"))

    def _cards(self, *, named: bool) -> list[Mapping[str, Any]]:
        """What the server says of each of its models; where one is named, it need not list them."""
        try:
            listed = self._connection.get("/models")
        except RefusedError as error:
            if named and error.status == HTTPStatus.NOT_FOUND:
                return []
            raise
        cards = listed.get("data") if isinstance(listed, Mapping) else None
        if isinstance(cards, list) and all(map(_is_card, cards)):
            return cards
        raise HerdError(f"{self._connection.address}/models is no list of models: is it a server of OpenAI's form?")


def _is_card(value: object) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("id"), str)
