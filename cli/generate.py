"""The generate command: one answer to one prompt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..console import HerdCommand, emit_json
from ..options import json_option
from .answers import answer_to_json, print_stream, print_timings, prompt_of
from .options import answer_options, checked_sampling, device_option, logprobs_option
from .prompts import file_option, prompt_option, read_prompt
from .source import Source, source_options

if TYPE_CHECKING:
    from ..runtimes.executors.options import Memory


@click.command(cls=HerdCommand)
@click.argument("bundle", required=False)
@click.argument("prompt", required=False)
@prompt_option
@file_option
@source_options
@answer_options
@device_option
@logprobs_option
@json_option
def generate(
    bundle: str | None, prompt: str | None, options: tuple[str, ...], files: tuple[Path, ...],
    images: tuple[Path, ...], url: str | None, model: str | None, api_key_file: Path | None, raw: bool,
    system: str | None, threads: int | None, memory: Memory, device: str | None, as_json: bool, **sampling: Any,
) -> None:
    """Answer one prompt with BUNDLE, or with the server at --url.

    PROMPT is what to say; - reads it from standard input. -p and -f give it in other ways.
    """
    if url is not None and prompt is None:
        bundle, prompt = None, bundle  # there is no bundle, so that the first word is the prompt
    source = Source(bundle=Path(bundle) if bundle is not None else None, url=url, model=model,
                    api_key_file=api_key_file, threads=threads, memory=memory, device=device)
    text, given = read_prompt(prompt, options, files), checked_sampling(sampling, as_json=as_json)
    speaker = source.open(images=images, system=system, raw=raw)
    pictures = [speaker.picture(image) for image in images]
    stream = speaker.stream(**prompt_of(text, pictures, system=system, raw=raw), **given)
    if as_json:
        for _ in stream:
            pass
        emit_json(answer_to_json(stream.result))
        return
    print_stream(stream)
    print_timings(stream.result)
