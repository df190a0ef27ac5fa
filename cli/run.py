"""The run command: prompts answered by replicas on a Ray cluster."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..console import HerdCommand, emit_json, stderr
from .answers import answer_to_json, user_turn
from .options import COUNT, PATH, check_sampling, json_option, sampling_options

if TYPE_CHECKING:
    from ..runtimes.engine import Memory


@click.command(cls=HerdCommand)
@click.argument("bundle", type=PATH)
@click.argument("prompts", metavar="PROMPT...", nargs=-1, required=True)
@click.option("--replicas", type=COUNT, default=1, show_default=True, help="Engines that share the prompts.")
@click.option("--cluster", metavar="ADDRESS", help="A running Ray cluster; without it Ray runs on this machine.")
@click.option("--raw", is_flag=True, help="Complete the prompts as they are, without the chat template.")
@sampling_options
@json_option
def run(
    bundle: Path, prompts: tuple[str, ...], replicas: int, cluster: str | None, raw: bool, threads: int | None,
    memory: Memory, as_json: bool, **sampling: Any,
) -> None:
    """Answer prompts with replicas of BUNDLE on a Ray cluster.

    Every prompt goes to the least busy replica; one that dies is started again.
    """
    from ..runtimes.server.replicas import Cluster, ClusterOptions

    check_sampling(sampling)
    options = ClusterOptions(replicas, cluster, threads=threads or 1, memory=memory)
    with stderr.status("starting replicas"):
        handle = Cluster(bundle, options)
    with handle:
        answers = handle.generate_all([text if raw else [user_turn(text, ())] for text in prompts], **sampling)
    if as_json:
        emit_json([answer_to_json(answer) for answer in answers])
        return
    for answer in answers:
        click.echo(answer.text)
