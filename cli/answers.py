"""What the verbs that answer prompts share: loading, the user's turn, streaming to the terminal, JSON."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..console import stderr
from ..errors import HerdError
from ..foreign_text import harmless
from .attachments import Attachments, Part

if TYPE_CHECKING:
    from ..runtimes import Engine, Generation
    from ..runtimes.executors.options import Memory


def load_engine(bundle: Path, threads: int | None, memory: Memory, device: str | None = None) -> Engine:
    """Check and load a bundle."""
    from ..runtimes import Engine

    with stderr.status("checking and loading the bundle"):
        return Engine.load(bundle, threads=threads, memory=memory, device=device)


def check_request(
    bundle: Path | None, attachments: Attachments, *, system: str | None = None, raw: bool = False
) -> None:
    """Refuse, before time is spent on loading, what a bundle cannot be asked; None is a server, which says so itself.

    Raises:
        HerdError: pictures for a model that reads text only, a system message or a video without a template, or not a
            bundle.
    """
    from ..runtimes.bundle.manifest import Bundle

    if raw and system is not None:
        raise HerdError("--system is said through the chat template, --raw is without it: leave one of them out")
    if raw and attachments.videos:
        raise HerdError("a video is shown through the chat template, --raw is without it: leave one of them out")
    if attachments and bundle is not None and Bundle.open(bundle, verify=False).manifest.config.vision is None:
        raise HerdError("this model reads text only, images were given")


def user_turn(text: str, parts: Sequence[Part]) -> dict[str, Any]:
    """The user's message of a chat: pictures and videos first, then the text."""
    if not parts:
        return {"role": "user", "content": text}
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def opening(system: str | None) -> list[dict[str, Any]]:
    """What a chat begins with: the system message, if there is one."""
    return [{"role": "system", "content": system}] if system else []


def prompt_of(text: str, parts: Sequence[Part], *, system: str | None, raw: bool) -> dict[str, Any]:
    """The arguments of ``Engine.stream`` for one prompt."""
    if raw:
        return {"prompt": text, "images": [part["image"] for part in parts] or None}
    return {"prompt": [*opening(system), user_turn(text, parts)]}


def echo_answer(text: str, *, newline: bool = True) -> None:
    """Print what a model said: as it is into a pipe, without what a terminal would obey on a terminal."""
    click.echo(harmless(text) if sys.stdout.isatty() else text, nl=newline, color=True)  # click drops nothing then


def print_stream(stream: Iterable[str]) -> None:
    """Print text as it is generated."""
    begun = False
    try:
        for text in stream:
            begun = True
            echo_answer(text, newline=False)
    except HerdError:
        if begun:
            click.echo()  # the error gets a line of its own
        raise
    click.echo()


def print_timings(result: Generation) -> None:
    """Say on standard error how long a finished answer took and why it ended."""
    timings = result.timings
    stderr.print(
        f"[dim]{timings.prompt_tokens} prompt tokens in {timings.prefill_seconds:.2f} s, {timings.new_tokens} new at "
        f"{timings.decode_tokens_per_second:.1f} tokens/s, ended by {result.finish_reason}[/dim]", soft_wrap=True
    )


def answer_to_json(result: Generation) -> dict[str, Any]:
    """An answer for scripts; ids that a server did not tell are left out."""
    from ..runtimes.client.pieces import UNKNOWN_TOKEN

    def known(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {name: value for name, value in pairs if (name, value) != ("token_id", UNKNOWN_TOKEN)}

    logprobs = [asdict(entry, dict_factory=known) for entry in result.logprobs]
    return {
        "text": result.text,
        **({"token_ids": result.token_ids} if result.token_ids else {}),
        "finish_reason": result.finish_reason,
        "timings": vars(result.timings),
        **({"logprobs": logprobs} if logprobs else {}),
    }
