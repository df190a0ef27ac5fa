"""A chat as it goes on: messages are answered, and words that begin with a slash are done."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Literal

from ..console import stderr, table
from ..errors import HerdError, StoppedError
from ..foreign_text import printable
from .answers import print_stream
from .attachments import Part, image_part, video_part
from .chat_input import first_word, is_terminal, stopped_by_interrupt
from .chat_options import ChatOptions
from .conversation import Attachment, Conversation, Turn

if TYPE_CHECKING:
    from ..model.processing import FrameSampling
    from ..runtimes import Generation
    from .speaker import Speaker

Kind = Literal["image", "video"]

_HELP = {
    "/image FILE [QUESTION]": "show a picture, with this question or the next message",
    "/video FILE [QUESTION]": "show a video likewise",
    "/regen": "answer the last message again",
    "/save FILE": "write the conversation to a new file",
    "/set [NAME [VALUE]]": "list the options, or change one; no value: the default",
    "/reset": "forget all that was said",
    "/quit": "end, as Ctrl-D does",
    "Alt-Enter, Ctrl-C": "begin a new line; stop an answer or clear the line",
}


class ChatSession:
    """What was said, and the pictures and videos that go with the next message.

    Args:
        speaker: answers.
        system: system message, None for none.
        raw: without the chat template.
        options: how answers are drawn.
        sampling: which frames of videos are looked at, None for the default.

    Raises:
        HerdError: a bundle has no tokenizer or chat template, or the system message is not text.
    """

    def __init__(
        self, speaker: Speaker, *, system: str | None, raw: bool, options: ChatOptions, sampling: FrameSampling | None
    ) -> None:
        self._speaker, self._options, self._sampling = speaker, options, sampling
        self._conversation, self._attachments = Conversation(system, raw), tuple[Attachment, ...]()
        speaker.prepare(self._conversation.prompt(Turn("Hello")))

    def handle(self, message: str) -> None:
        """Do what a message says, or answer it.

        Raises:
            HerdError: it cannot be done; the conversation stays as it was.
        """
        word, _, rest = message.partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "/help": self._help, "/image": partial(self._show, "image"), "/video": partial(self._show, "video"),
            "/regen": self._regenerate, "/save": self._save, "/set": self._set, "/reset": self._reset}
        if word in commands:
            commands[word](rest.strip())
        elif re.fullmatch(r"/\w+", word):
            raise HerdError(f"there is no command {word}: /help lists them")
        elif message:
            self._answer(Turn(message, self._attachments))

    def attach(self, kind: Kind, name: str) -> None:
        """Show a picture or video with the next message.

        Raises:
            HerdError: it cannot be read, the model reads text only, or there are no messages.
        """
        if self._conversation.raw:
            raise HerdError("with --raw there are no messages that a picture could belong to: chat without it")
        path = Path(name).expanduser()
        named: Part = {"type": kind, "path": str(path)}
        if kind == "image":
            attachment = Attachment(image_part(self._speaker.picture(path)), named)
        else:
            how = self._sampling.fields() if self._sampling else {}
            attachment = Attachment(video_part(self._speaker.video(path, self._sampling)), named | how)
        self._attachments = (*self._attachments, attachment)

    # -- commands ------------------------------------------------------------------------------------------------

    def _help(self, _: str) -> None:
        table("commands", _HELP, err=True)

    def _show(self, kind: Kind, rest: str) -> None:
        if not rest:
            raise HerdError(f"/{kind} needs the name of a file: /{kind} FILE")
        # Blanks that nobody escaped are part of the name where there is such a file.
        name, question = (rest, "") if Path(rest).expanduser().is_file() else first_word(rest)
        self.attach(kind, name)
        if question:
            self._answer(Turn(question, self._attachments))
        else:
            _note(f"{name} goes with the next message")

    def _regenerate(self, _: str) -> None:
        turns = self._conversation.turns
        if not turns:
            raise HerdError("nothing was answered yet: say something first")
        last = turns.pop()
        try:
            self._answer(last)
        except HerdError:
            turns.append(last)
            raise
        if turns[-1].answer == last.answer:
            _note("that is the same answer; /set temperature 0.8 makes them differ")

    def _save(self, rest: str) -> None:
        name, _ = first_word(rest)
        if not name:
            raise HerdError("/save needs the name of a file: /save FILE")
        path = Path(name).expanduser()
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(self._conversation.document())
        except (OSError, ValueError) as error:
            raise HerdError(f"{name} cannot be written: {getattr(error, 'strerror', None) or error}") from error
        _note(f"saved as {path}")

    def _set(self, rest: str) -> None:
        recommended = self._speaker.generation_defaults
        spelling, _, text = rest.partition(" ")
        if not spelling:
            table("options", self._options.rows(recommended), err=True)
            return
        name = self._options.set(spelling, text.strip())
        _note(f"{name} is {self._options.rows(recommended)[name]}")

    def _reset(self, _: str) -> None:
        self._conversation.turns.clear()
        self._attachments = ()
        _note("forgot all that was said")

    # -- answers -------------------------------------------------------------------------------------------------

    def _answer(self, turn: Turn) -> None:
        """Answer a turn; one that cannot be answered is not kept, one that was stopped is, as far as it got."""
        prompt = self._conversation.prompt(turn)
        stream = self._speaker.stream(prompt, **self._options.given)
        with stopped_by_interrupt() as pressed, self._speaker.stopped_by(pressed.is_set):
            print_stream(_until(stream, pressed))
        self._conversation.turns.append(replace(turn, answer=stream.result.text))
        self._attachments = ()
        _note(self._account(stream.result, stopped=pressed.is_set()))

    def _account(self, result: Generation, *, stopped: bool) -> str:
        """How fast an answer was, why it ended, and what helps if it was cut off."""
        timings, most = result.timings, self._options.given["max_new_tokens"]
        reason = "ended by the model"
        if stopped:
            reason = "stopped by Ctrl-C"
        elif result.finish_reason == "length" and timings.new_tokens >= most:
            reason = f"cut off at {most} tokens (/set max-new-tokens {2 * most} allows more)"
        elif result.finish_reason == "length":
            limit = f" of {self._speaker.context} tokens" if self._speaker.context else ""
            reason = f"cut off where the context{limit} is full (/reset begins anew)"
        return f"{timings.new_tokens} tokens at {timings.decode_tokens_per_second:.1f} tokens/s, {reason}"


def _until(stream: Iterable[str], stopped: Event) -> Iterator[str]:
    """Text up to the one during which somebody stopped; none where that was while the prompt was computed."""
    with suppress(StoppedError):
        for text in stream:
            yield text
            if stopped.is_set():
                return


def _note(text: str) -> None:
    """Say something in a dim line to whoever sits there; a script gets answers and errors only."""
    if is_terminal():
        stderr.print(printable(text), style="dim", markup=False, soft_wrap=True)
