"""The generate command: one answer to one prompt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..console import HerdCommand, emit_json
from ..options import PATH, json_option
from .answers import answer_to_json, check_request, load_engine, print_stream, print_timings, prompt_of
from .options import answer_options, checked_sampling, logprobs_option
from .prompts import file_option, prompt_option, read_prompt

if TYPE_CHECKING:
    from ..runtimes.executors.options import Memory


@click.command(cls=HerdCommand)
@click.argument("bundle", type=PATH)
@click.argument("prompt", required=False)
@prompt_option
@file_option
@answer_options
@logprobs_option
@json_option
def generate(
    bundle: Path, prompt: str | None, options: tuple[str, ...], files: tuple[Path, ...], images: tuple[Path, ...],
    raw: bool, system: str | None, threads: int | None, memory: Memory, as_json: bool, **sampling: Any,
) -> None:
    """Answer one prompt with BUNDLE.

    PROMPT is what to say; - reads it from standard input. -p and -f give it in other ways.
    """
    text, given = read_prompt(prompt, options, files), checked_sampling(sampling, as_json=as_json)
    check_request(bundle, images, system=system, raw=raw)
    engine = load_engine(bundle, threads, memory)
    stream = engine.stream(**prompt_of(text, images, system=system, raw=raw), **given)
    if as_json:
        for _ in stream:
            pass
        emit_json(answer_to_json(stream.result))
        return
    print_stream(stream)
    print_timings(stream)
