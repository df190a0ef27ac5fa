"""The verify command: a bundle's logits against those of the torch model."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..console import HerdCommand, emit_json, stderr, table
from ..errors import HerdError
from ..options import PATH, TokenCount, json_option
from .answers import check_request, user_turn
from .attachments import Attachments, image_part

if TYPE_CHECKING:
    from ..export.verify import Array, Fidelity
    from ..runtimes import Engine


@click.command(cls=HerdCommand)
@click.argument("bundle", type=PATH)
@click.argument("checkpoint", type=PATH)
@click.option("-p", "--prompt", show_default="random tokens, with an image where possible", help="Text to compare on.")
@click.option("--image", "images", type=PATH, multiple=True,
              help="Picture before the prompt; may be repeated, needs -p.")
@click.option("--tokens", type=TokenCount(2), default=128, show_default=True, help="Number of random tokens.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the random tokens.")
@click.option("--bound", "difference", type=click.FloatRange(min=0), show_default="by recipe: 0.001 of fp32",
              help="Largest logit difference that passes.")
@click.option("--max-kl", "kl", type=click.FloatRange(min=0), show_default="by recipe: 0.02 of int8, 0.08 of int4, fp8",
              help="Largest mean KL divergence that passes, in nats.")
@click.option("--min-top1", "top1", type=click.FloatRange(0, 1), show_default="by recipe: 0.9, 0.75, 0.8",
              help="Smallest share of positions with the same most likely token that passes.")
@json_option
def verify(
    bundle: Path, checkpoint: Path, prompt: str | None, images: tuple[Path, ...], tokens: int, seed: int,
    as_json: bool, **bounds: float | None,
) -> None:
    """Compare BUNDLE with the torch model of CHECKPOINT.

    Exits with 1 when the logits are further apart than a healthy bundle of its recipe can be: fp32 is judged by the
    largest logit difference, others by KL divergence and most likely tokens. The torch model is held in memory in
    float32 as a whole.
    """
    from ..export.bounds import BOUNDS
    from ..export.verify import compare
    from ..model.checkpoint import open_checkpoint
    from ..model.llama4.model import Llama4
    from ..runtimes import Engine

    if images and prompt is None:
        raise HerdError("--image needs a prompt: give one with -p, or no image")
    check_request(bundle, Attachments(images))
    with stderr.status("checking and loading the bundle"):
        engine = Engine.load(bundle)
    token_ids, pixels = _prepared(engine, prompt, images, tokens, seed)
    with open_checkpoint(checkpoint) as source:
        if source.config != engine.config:
            raise HerdError(f"{bundle} was built from another configuration than {checkpoint} has: nothing to compare")
        with stderr.status("loading the torch model and comparing"):
            report = compare(engine, Llama4.from_checkpoint(source).eval(), token_ids, pixels)
    recipe = engine.bundle.manifest.recipe
    wanted = replace(BOUNDS[recipe], **{name: value for name, value in bounds.items() if value is not None})
    broken = list(wanted.broken(report.to_json()))
    if as_json:
        emit_json({**report.to_json(), "recipe": recipe, "bounds": asdict(wanted), "passed": not broken})
    else:
        table(f"fidelity to the torch model, recipe {recipe}", _rows(report))
    if broken:
        raise HerdError("; ".join(broken))


def _rows(report: Fidelity) -> dict[str, str]:
    """The report for people."""
    return {
        "positions compared": str(report.tokens),
        "same most likely token": f"{report.top1_agreement:.1%}",
        "KL divergence": f"{report.mean_kl:.3g} nats on average, {report.max_kl:.3g} at most",
        "logit difference": f"{report.max_difference:.3g} at most, {report.mean_difference:.3g} on average, where the "
                            f"logits' standard deviation is {report.logit_std:.3g}",
        "decoding one by one": f"logit difference {report.decode_difference:.3g} at most, KL divergence from the whole "
                               f"prompt {report.decode_kl:.3g} nats",
    }


def _prepared(
    engine: Engine, prompt: str | None, images: tuple[Path, ...], tokens: int, seed: int
) -> tuple[list[int], Array | None]:
    """The tokens and pixels to compare on: those of the prompt, or random ones."""
    from ..export.verify import random_prompt

    if prompt is None:
        return random_prompt(engine.config, tokens, images=1 if engine.config.vision else 0, seed=seed)
    prepared = engine.processor.prepare([user_turn(prompt, list(map(image_part, images)))] if images else prompt)
    return prepared.token_ids, prepared.pixel_values
