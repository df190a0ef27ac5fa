"""The run command: prompts answered by replicas on a Ray cluster."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..console import HerdCommand, emit_json, stderr
from ..options import COUNT, PATH, json_option
from .answers import answer_to_json, check_request, echo_answer, prompt_of
from .attachments import Attachments
from .options import answer_options, checked_sampling, logprobs_option
from .prompts import file_option, prompt_option, read_prompts

if TYPE_CHECKING:
    from ..runtimes.executors.options import Memory


@click.command(cls=HerdCommand)
@click.argument("bundle", type=PATH)
@click.argument("prompts", metavar="[PROMPT]...", nargs=-1)
@prompt_option
@file_option
@click.option("--replicas", type=COUNT, default=1, show_default=True, help="Engines that share the prompts.")
@click.option("--cluster", metavar="ADDRESS", help="A running Ray cluster; without it Ray runs on this machine.")
@answer_options
@logprobs_option
@json_option
def run(
    bundle: Path, prompts: tuple[str, ...], options: tuple[str, ...], files: tuple[Path, ...],
    attachments: Attachments, replicas: int, cluster: str | None, raw: bool, system: str | None, threads: int | None,
    memory: Memory, as_json: bool, **sampling: Any,
) -> None:
    """Answer prompts with replicas of BUNDLE on a Ray cluster.

    Replicas share the prompts; one that dies is started again.
    """
    from ..model.processing import load_image, load_video
    from ..runtimes.server.cluster_options import ClusterOptions
    from ..runtimes.server.replicas import Cluster

    texts, given = read_prompts(prompts, options, files), checked_sampling(sampling, as_json=as_json)
    check_request(bundle, attachments, system=system, raw=raw)
    shown = attachments.parts(load_image, load_video)  # the files need not be there on other nodes
    if raw and shown:
        given["images"] = [part["image"] for part in shown]
    asked = [prompt_of(text, shown, system=system, raw=raw)["prompt"] for text in texts]
    with stderr.status("starting replicas"):
        handle = Cluster(bundle, ClusterOptions(replicas, cluster, threads=threads or 1, memory=memory))
    with handle:
        answers = handle.generate_all(asked, **given)
    if as_json:
        emit_json([{"prompt": text, **answer_to_json(answer)} for text, answer in zip(texts, answers, strict=True)])
    else:
        _show(texts, [answer.text for answer in answers])


def _show(questions: list[str], answers: list[str]) -> None:
    """Print every question, marked as in mails, with its answer below."""
    for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        if number:
            click.echo()
        echo_answer("\n".join(f"> {line}" for line in question.splitlines()))
        echo_answer(answer)
