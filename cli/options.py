"""Options that several verbs share, each written once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

PATH = click.Path(path_type=Path)
COUNT = click.IntRange(min=1)

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
threads_option = click.option("--threads", type=click.IntRange(1, 1024), show_default="one per core",
                              help="Threads of one operator, on every rank.")
memory_option = click.option("--memory", type=click.Choice(["fast", "low"]), default="fast", show_default=True,
                             help="low: use weights as they lie on disk, read only when needed; slower.")


def sampling_options(command: Any) -> Any:
    """Add how tokens are drawn, how many, and how the engine runs."""
    options = (
        click.option("--max-new-tokens", type=COUNT, default=256, show_default=True, help="Length limit."),
        click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True,
                     help="0 is greedy; the reference uses 0.6."),
        click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True,
                     help="Nucleus; the reference uses 0.9."),
        click.option("--top-k", type=click.IntRange(min=0), default=0, show_default=True,
                     help="Keep the k most likely tokens, 0 for all."),
        click.option("--seed", type=click.IntRange(min=0), show_default="another each time", help="Seed of the draws."),
        threads_option,
        memory_option,
    )
    for option in reversed(options):
        command = option(command)
    return command


def check_sampling(sampling: dict[str, Any]) -> None:
    """Refuse values of sampling options before time is spent on loading a bundle.

    Raises:
        HerdError: a value is out of its range.
    """
    from ..runtimes.generation.sampling import Sampling

    Sampling(**{name: value for name, value in sampling.items() if name != "max_new_tokens"})
