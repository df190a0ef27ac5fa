"""The generate command: one answer to one prompt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..console import HerdCommand, emit_json
from .answers import answer_to_json, load_engine, print_stream, print_timings, user_turn
from .options import PATH, sampling_options

if TYPE_CHECKING:
    from ..runtimes.engine import Memory


@click.command(cls=HerdCommand)
@click.argument("bundle", type=PATH)
@click.option("-p", "--prompt", required=True, help="What to say.")
@click.option("--image", "images", type=PATH, multiple=True,
              help="Picture to look at; may be repeated. With --raw, the prompt says where by <|image|>.")
@click.option("--raw", is_flag=True, help="Complete the prompt as it is, without the chat template.")
@click.option("--stop", multiple=True, help="End before this string; may be repeated.")
@sampling_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of streaming.")
def generate(
    bundle: Path, prompt: str, images: tuple[Path, ...], raw: bool, stop: tuple[str, ...], threads: int | None,
    memory: Memory, as_json: bool, **sampling: Any,
) -> None:
    """Answer one prompt with BUNDLE."""
    engine = load_engine(bundle, threads, memory, sampling)
    stream = engine.stream(
        prompt if raw else [user_turn(prompt, images)], images=list(images) if raw and images else None,
        stop=stop, **sampling,
    )
    if as_json:
        for _ in stream:
            pass
        emit_json(answer_to_json(stream.result))
        return
    print_stream(stream)
    print_timings(stream)
