"""A lowered graph becomes a TensorRT plan of a bundle: its optimisation profiles, and what was proved of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ....model.config import HerdConfig
from ....runtimes.executors.runner import PREFILL_CHUNK
from ...weights.writer import stream
from ..options import PlanOptions
from . import Check
from .builder import Profile
from .plan import VERSION

LONGEST_CHUNK = 2048
"""Most tokens of a prompt in one call; a plan is tuned for ``PREFILL_CHUNK``, which the runtime makes."""
TILES = 17
"""The most tiles of a picture."""

Build = Callable[[Path, Path, list[Profile]], dict[str, Any]]
"""Builds a plan from an ONNX file, and says what the manifest is to say of it."""


def described(check: Check) -> dict[str, Any]:
    """What was proved of a plan, for a manifest."""
    return {
        "sm": list(check.plan.targets), "tensorrt": VERSION, "fp8_products": check.fp8,
        "fp8_intended": check.intended, "products": len(check.rows), "fallbacks": [row.gemm for row in check.fallbacks],
        "collectives": len(check.plan.meeting(min(check.plan.profiles))),
    }


def profiles_of(config: HerdConfig, role: str, options: PlanOptions) -> list[Profile]:
    """Optimisation profiles of a graph.

    Args:
        config: the model.
        role: ``decoder`` or ``vision``.
        options: limits.
    """
    if role == "vision":
        return [Profile(name="images", tiles=(1, 4, TILES))]
    text = config.text
    context = min(options.context or 1 << 17, text.max_position_embeddings)
    local = min(text.attention_chunk_size or context, context)
    slots = {"slots_local": (1, min(1024, local), local), "slots_global": (1, min(4096, context), context)}
    longest = min(LONGEST_CHUNK, local)
    usual = min(PREFILL_CHUNK, longest)
    decode = Profile(name="decode", batch=(1, 1, options.batch), **slots)
    prefill = Profile(name="prefill", tokens=(1, usual, longest), image_tokens=(0, 0, longest), rows=(1, 1, longest),
                      **slots)
    return {"both": [decode, prefill], "decode": [decode], "prefill": [prefill]}[options.profile]


def write_plan(
    model: ir.Model, directory: Path, role: str, config: HerdConfig, on_bytes: Callable[[int], None] = lambda _: None,
    *, options: PlanOptions, build: Build,
) -> tuple[str, dict[str, Any]]:
    """Write one graph's plan.

    Args:
        model: lowered.
        directory: where the plan is written; the ONNX file and its weights lie there meanwhile.
        role: ``decoder`` or ``vision``.
        config: the model's configuration.
        on_bytes: called with the bytes of every weight that was written.
        options: what it is built for.
        build: the builder.

    Returns:
        The plan's file name, and what the manifest says of it.

    Raises:
        HerdError: TensorRT refuses the model, or the plan is not what the model meant.
    """
    onnx, data, plan = (directory / f"{role}.{suffix}" for suffix in ("onnx", "weights", "plan"))
    stream(model, directory, data.name, on_bytes)
    ir.save(model, onnx)
    profiles = profiles_of(config, role, options)
    found = build(onnx, plan, profiles)
    onnx.unlink()
    data.unlink()
    return plan.name, found | {"profiles": [profile.to_json() for profile in profiles]}
