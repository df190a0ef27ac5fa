"""What the verbs that answer prompts share: loading, the user's turn, streaming to the terminal, JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..console import stderr
from .options import check_sampling

if TYPE_CHECKING:
    from ..runtimes import Engine, Generation, TextStream
    from ..runtimes.engine import Memory


def load_engine(bundle: Path, threads: int | None, memory: Memory, sampling: dict[str, Any]) -> Engine:
    """Load a bundle, after sampling options that it would refuse later were refused."""
    from ..runtimes import Engine

    check_sampling(sampling)
    with stderr.status("checking and loading the bundle"):
        return Engine.load(bundle, threads=threads, memory=memory)


def user_turn(text: str, images: Sequence[Any]) -> dict[str, Any]:
    """The user's message of a chat: pictures first, then the text."""
    if not images:
        return {"role": "user", "content": text}
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def print_stream(stream: TextStream) -> None:
    """Print text as it is generated."""
    for text in stream:
        click.echo(text, nl=False)
    click.echo()


def print_timings(stream: TextStream) -> None:
    """Say on standard error how long a finished answer took and why it ended."""
    timings = stream.result.timings
    stderr.print(
        f"[dim]{timings.prompt_tokens} prompt tokens in {timings.prefill_seconds:.2f} s, {timings.new_tokens} new at "
        f"{timings.decode_tokens_per_second:.1f} tokens/s, ended by {stream.result.finish_reason}[/dim]", soft_wrap=True
    )


def answer_to_json(result: Generation) -> dict[str, Any]:
    """An answer for scripts."""
    return {
        "text": result.text,
        "token_ids": result.token_ids,
        "finish_reason": result.finish_reason,
        "timings": vars(result.timings),
    }
