"""Options of the verbs that answer prompts: ``generate``, ``chat`` and ``run`` take the same ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

from ..errors import HerdError
from ..options import COUNT, Integer, Number
from .attachments import attachment_options

threads_option = click.option("-t", "--threads", type=Integer(1, 1024), show_default="one per core",
                              help="Threads of one operator, on every rank.")
memory_option = click.option("--memory", type=click.Choice(["fast", "low"]), default="fast", show_default=True,
                             help="low: use weights as they lie on disk, read only when needed; slower.")
device_option = click.option("--device", metavar="cuda:N", show_default="cuda:0",
                             help="GPU of a bundle that is built for one.")
raw_option = click.option("--raw", is_flag=True, help="Complete the text as it is, without the chat template.")
system_option = click.option("--system", help="System message.")
logprobs_option = click.option("--logprobs", type=Integer(0, 100), metavar="N",
                               help="With --json: every token's log-probability, and the N likeliest alternatives.")

_RECOMMENDED = "as the checkpoint recommends, else greedy"

_SAMPLING = (
    click.option("-n", "--max-new-tokens", type=COUNT, default=256, show_default=True, help="Length limit."),
    click.option("--temperature", type=Number(min=0), show_default=_RECOMMENDED,
                 help="0 is greedy; the reference uses 0.6."),
    click.option("--top-p", type=Number(0, 1, min_open=True), show_default="as the checkpoint recommends",
                 help="Nucleus; 1 keeps all, the reference uses 0.9."),
    click.option("--top-k", type=Integer(min=0), show_default="as the checkpoint recommends",
                 help="Keep the k most likely tokens, 0 for all."),
    click.option("--min-p", type=Number(0, 1), show_default="as the checkpoint recommends",
                 help="Keep tokens at least this likely relative to the most likely one, 0 for all."),
    click.option("--repetition-penalty", type=Number(min=0, min_open=True),
                 show_default="as the checkpoint recommends", help="Above 1 discourages tokens that occurred."),
    click.option("--seed", type=Integer(min=0), show_default="another each time", help="Seed of the draws."),
    click.option("--stop", multiple=True, help="End before this string; may be repeated."),
    click.option("--stop-id", "stop_ids", type=Integer(min=0), multiple=True, show_default="the model's own",
                 help="End after this token; may be repeated."),
)
SAMPLING = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop",
            "stop_ids")
"""Names of these options as parameters: those of ``Engine.stream``."""


def answer_options(command: Any) -> Any:
    """Add what the three verbs share: how tokens are drawn and how many, the chat, and how the engine runs."""
    others: tuple[Callable[[Any], Any], ...] = (
        memory_option, threads_option, attachment_options, system_option, raw_option)
    for option in (*others, *reversed(_SAMPLING)):
        command = option(command)
    return command


def checked_sampling(options: Mapping[str, Any], *, as_json: bool = False) -> dict[str, Any]:
    """The sampling options that were given, to be passed to ``Engine.stream``, before time is spent on loading.

    Args:
        options: by name, None or empty where nothing was given.
        as_json: whether log-probabilities will be seen.

    Raises:
        HerdError: a value is out of its range, or log-probabilities would not be seen.
    """
    from ..runtimes.generation.sampling import Sampling

    given = {name: value for name, value in options.items() if value not in (None, ())}
    Sampling(**{name: value for name, value in given.items() if name in Sampling.__dataclass_fields__})
    if "logprobs" in given and not as_json:
        raise HerdError("--logprobs are shown in JSON only: add --json")
    return given
