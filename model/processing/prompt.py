"""A prompt as users write it to what the model takes: token ids and tiles.

Every picture stands in the text as one ``<|image|>``, which becomes, for a single tile,

    <|image_start|> <|image|> patch * n <|image_end|>

and for rows x columns tiles, row by row with separators and the global tile last,

    <|image_start|> (patch * n [<|tile_x_separator|> patch * n ...] <|tile_y_separator|>) * rows
    <|image|> patch * n <|image_end|>                                          n = tokens per tile

A video in a message is some of its frames (``frames``), each a picture of one tile behind its time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import HerdError, TooLongError, shown
from ..config import HerdConfig
from .chat import ChatTemplate
from .frames import Frame
from .generation_defaults import GenerationDefaults
from .images import ImageProcessor, TiledImage
from .messages import checked_messages
from .pictures import Source
from .tokenizer import Tokenizer, load_tokenizer
from .video import showing_frames

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""A raw completion, its token ids, or chat messages with roles and contents."""


@dataclass(frozen=True)
class PreparedPrompt:
    """What an engine's ``prefill`` takes.

    Attributes:
        token_ids: with image tokens where features go.
        pixel_values: float32 [tiles, 3, side, side] of all pictures in order, None without pictures.
    """

    token_ids: list[int]
    pixel_values: np.ndarray[Any, Any] | None = None


class PromptProcessor:
    """Tokenizer, chat template and image processor of one model.

    Args:
        directory: files of a checkpoint or bundle. They are read when they are first needed, so that a model without
            tokenizer files still works with token ids.
        config: the model.
    """

    def __init__(self, directory: Path, config: HerdConfig) -> None:
        self._directory, self._config = Path(directory), config

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            HerdError: the directory has none.
        """
        return load_tokenizer(self._directory, eos_ids=self._config.text.eos_token_ids)

    @property
    def has_tokenizer(self) -> bool:
        """Whether the directory has a tokenizer."""
        return any((self._directory / name).exists() for name in ("tokenizer.json", "tokenizer.model"))

    @cached_property
    def generation_defaults(self) -> GenerationDefaults:
        """How the checkpoint's authors want it sampled.

        Raises:
            HerdError: ``generation_config.json`` has a value of the wrong kind.
        """
        return GenerationDefaults.from_directory(self._directory)

    @cached_property
    def _template(self) -> ChatTemplate | None:
        return ChatTemplate.from_directory(self._directory, self.tokenizer)

    @property
    def has_template(self) -> bool:
        """Whether messages can be given.

        Raises:
            HerdError: there is a template that cannot be used.
        """
        return self._template is not None

    @property
    def template(self) -> ChatTemplate:
        """The chat template.

        Raises:
            HerdError: the model has none.
        """
        if self._template is None:
            raise HerdError("this model has no chat template: give the prompt as a plain string (--raw)")
        return self._template

    @cached_property
    def image_processor(self) -> ImageProcessor:
        """Tiling and normalisation.

        Raises:
            HerdError: the model reads text only.
        """
        if self._config.vision is None:
            raise HerdError("this model reads text only, images were given")
        return ImageProcessor.from_directory(self._directory, self._config.vision.image_size)

    def prepare(
        self, prompt: Prompt, *, images: Sequence[Source | Frame] | None = None, tools: Sequence[Any] | None = None,
        variables: Mapping[str, Any] | None = None, most_tokens: int | None = None,
    ) -> PreparedPrompt:
        """Tokens and tiles of a prompt.

        Args:
            prompt: a string is a raw completion, token ids are one that was encoded already; messages have roles and
                contents, pictures and videos among them.
            images: pictures for the ``<|image|>`` placeholders of a string.
            tools: descriptions for templates that offer tools.
            variables: further ones that the chat template may look at.
            most_tokens: that the prompt may have, None for the model's context.

        Raises:
            HerdError: an empty prompt, an unknown role, pictures and placeholders that do not match, a picture that
                cannot be read, or too many tokens.
        """
        pictures, offered = _listed("images", images), _listed("tools", tools)
        if _is_encoded(prompt):
            if pictures or offered:
                raise HerdError("a prompt of token ids takes no images and no tools: give a text or messages")
            return PreparedPrompt(whole_numbers(prompt))
        limit = most_tokens or self._config.text.max_position_embeddings
        if isinstance(prompt, str):
            if offered:
                raise HerdError("tools= belongs to messages: a string prompt has no template that would offer them")
            if not prompt:
                raise HerdError("the prompt is empty: give a text or at least one message")
            self.tokenizer.require_room(prompt, limit)
            ids, sources = self.tokenizer.encode_completion(prompt), pictures
        else:
            messages = self._with_frames(checked_messages(prompt))
            if pictures:
                raise HerdError("images= belongs to a string prompt: put the pictures into the messages")
            mixed = [message["content"] for message in messages if isinstance(message["content"], list)]
            sources = [part["source"] for parts in mixed for part in parts if part["type"] == "image"]
            ids = self.template.encode(messages, self.tokenizer, tools=offered or None, variables=variables,
                                       most_tokens=limit)
        self._require_placeholders(ids, len(sources))
        tiled = self._tiled(sources, limit, len(ids))
        ids = self._with_images(ids, tiled)
        if len(ids) > limit:
            raise TooLongError(f"the prompt has {len(ids)} tokens, the model's context is {limit}: shorten it")
        return PreparedPrompt(ids, np.concatenate([image.pixels for image in tiled]) if tiled else None)

    def _with_frames(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Messages without videos; a model that reads text only refuses them before they are decoded."""
        mixed = [message["content"] for message in messages if isinstance(message["content"], list)]
        if not any(part["type"] == "video" for parts in mixed for part in parts):
            return messages
        assert self.image_processor, "a model without images refuses them here"
        return [showing_frames(message) for message in messages]

    def _require_placeholders(self, ids: list[int], images: int) -> None:
        if images:
            assert self.image_processor, "a model without images refuses them here"
        placeholder = self.tokenizer.token_to_id("<|image|>") if self._config.vision else None
        found = ids.count(placeholder) if placeholder is not None else 0
        if found != images:
            raise HerdError(f"the prompt has {found} image placeholders and {images} images: they must match")

    def _tiled(self, sources: Sequence[Source | Frame], limit: int, tokens: int) -> list[TiledImage]:
        """The pictures' tiles; those that there is no room for are not even opened."""
        tiled: list[TiledImage] = []
        room = limit - tokens
        for number, source in enumerate(sources):
            if room < 0:
                raise TooLongError(f"the prompt has {limit - room} tokens with {number} of its {len(sources)} "
                                   f"pictures, the model's context is {limit}: shorten it")
            tiled.append(self.image_processor.process(source))
            room -= len(self._image_tokens(tiled[-1])) - 1
        return tiled

    def _with_images(self, ids: list[int], images: list[TiledImage]) -> list[int]:
        """Replace every placeholder by its picture's tokens."""
        if not images:
            return ids
        placeholder = self.tokenizer.token_to_id("<|image|>")
        remaining, expanded = iter(images), []
        for token in ids:
            expanded += self._image_tokens(next(remaining)) if token == placeholder else [token]
        return expanded

    def _image_tokens(self, image: TiledImage) -> list[int]:
        assert self._config.vision is not None, "images were refused before"
        patches = [self._config.image_token_id] * self._config.vision.tokens_per_tile
        ids = [self._special("<|image_start|>")]
        if image.rows * image.columns > 1:
            for _ in range(image.rows):
                for column in range(image.columns):
                    ids += [*([self._special("<|tile_x_separator|>")] if column else []), *patches]
                ids.append(self._special("<|tile_y_separator|>"))
        return [*ids, self._special("<|image|>"), *patches, self._special("<|image_end|>")]

    def _special(self, token: str) -> int:
        found = self.tokenizer.token_to_id(token)
        if found is None:
            raise HerdError(f"the tokenizer has no {token} token, which images need: is it this model's tokenizer?")
        return found


def whole_numbers(token_ids: Sequence[Any]) -> list[int]:
    """Token ids as Python's own numbers.

    Raises:
        HerdError: one is something else.
    """
    for token in token_ids:
        if not isinstance(token, Integral):
            raise HerdError(f"a token id is {shown(token)}, it must be a whole number")
    return [int(token) for token in token_ids]


def _is_encoded(prompt: Prompt) -> bool:
    return isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], Integral)


def _listed(name: str, values: object) -> list[Any]:
    if values is None:
        return []
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise HerdError(f"{name} is {shown(values)}, a list is needed")
    return list(values)
