"""The verify command: a bundle's logits against those of the torch model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..console import HerdCommand, emit_json, stderr, table
from ..errors import HerdError
from .answers import user_turn
from .options import PATH, json_option

if TYPE_CHECKING:
    from ..export.verify import Array
    from ..runtimes import Engine


@click.command(cls=HerdCommand)
@click.argument("bundle", type=PATH)
@click.argument("checkpoint", type=PATH)
@click.option("-p", "--prompt", show_default="random tokens, with an image where possible", help="Text to compare on.")
@click.option("--image", "images", type=PATH, multiple=True,
              help="Picture before the prompt; may be repeated, needs -p.")
@click.option("--tokens", type=click.IntRange(min=2), default=128, show_default=True, help="Number of random tokens.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the random tokens.")
@click.option("--bound", type=click.FloatRange(min=0), default=1e-3, show_default=True,
              help="Largest logit difference that passes.")
@json_option
def verify(
    bundle: Path, checkpoint: Path, prompt: str | None, images: tuple[Path, ...], tokens: int, seed: int, bound: float,
    as_json: bool,
) -> None:
    """Compare BUNDLE with the torch model of CHECKPOINT.

    Exits with 1 when a logit differs by more than the bound. The torch model is held in memory in float32 as a whole.
    """
    from ..export.verify import compare
    from ..model.checkpoint import open_checkpoint
    from ..model.llama4.model import Llama4
    from ..runtimes import Engine

    if images and prompt is None:
        raise HerdError("--image needs a prompt: give one with -p, or no image")
    with stderr.status("checking and loading the bundle"):
        engine = Engine.load(bundle)
    token_ids, pixels = _prepared(engine, prompt, images, tokens, seed)
    with open_checkpoint(checkpoint) as source:
        if source.config != engine.config:
            raise HerdError(f"{bundle} was built from another configuration than {checkpoint} has: nothing to compare")
        with stderr.status("loading the torch model and comparing"):
            report = compare(engine, Llama4.from_checkpoint(source).eval(), token_ids, pixels)
    largest = max(report.max_difference, report.decode_difference)
    passed = largest <= bound
    if as_json:
        emit_json({**report.to_json(), "bound": bound, "passed": passed})
    else:
        table("fidelity to the torch model", {name: f"{value:.3g}" for name, value in report.to_json().items()})
    if not passed:
        raise HerdError(f"the largest logit difference is {largest:.3g}, the bound is {bound:.3g}")


def _prepared(
    engine: Engine, prompt: str | None, images: tuple[Path, ...], tokens: int, seed: int
) -> tuple[list[int], Array | None]:
    """The tokens and pixels to compare on: those of the prompt, or random ones."""
    from ..export.verify import random_prompt

    if prompt is None:
        return random_prompt(engine.config, tokens, images=1 if engine.config.vision else 0, seed=seed)
    prepared = engine.processor.prepare([user_turn(prompt, images)] if images else prompt)
    return prepared.token_ids, prepared.pixel_values
