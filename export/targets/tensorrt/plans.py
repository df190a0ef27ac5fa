"""Plans for a bundle: a lowered model becomes a TensorRT plan, checked, and what was proved of it.

Experts, by profile:

===========  =============  ==================================================================================
profile      experts        why
===========  =============  ==================================================================================
``both``     dense-masked   one plan for prompts and tokens; every expert runs on every token, which costs
                            arithmetic in prompts and reads all experts for a token: safe, the default
``decode``   gathered       a token reads its own experts only; copies them, so for small batches
``prefill``  unrolled       exact arithmetic: each expert on its own rows, at least one
===========  =============  ==================================================================================

A bundle holds one of them: for a cluster that gives prompts and tokens to different GPUs, build two. With ``decode`` a
prompt is read token by token, and pictures cannot be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import InPlacePass

from ....errors import HerdError
from ....model.config import HerdConfig
from ....model.quantization.recipes import Recipe
from ....runtimes.executors.runner import PREFILL_CHUNK
from ...passes import ComputeIn, LowerExpertsDense, LowerExpertsGathered, LowerExpertsUnrolled
from ...weights.stream import stream
from . import Check
from .builder import Profile, build_plan, check_targets, load_tensorrt_rtx
from .enterprise import build_plan_here, load_tensorrt
from .plan import VERSION

PROFILES: dict[str, type[InPlacePass]] = {
    "both": LowerExpertsDense, "decode": LowerExpertsGathered, "prefill": LowerExpertsUnrolled,
}
LONGEST_CHUNK = 2048
"""Most tokens of a prompt in one call; a plan is tuned for ``PREFILL_CHUNK``, which the runtime makes."""
TILES = 17
"""The most tiles of a picture."""

Build = Callable[[Path, Path, list[Profile]], dict[str, Any]]
"""Builds a plan from an ONNX file, and says what the manifest is to say of it."""


@dataclass(frozen=True)
class PlanOptions:
    """What plans are built for.

    Attributes:
        sm: compute capabilities, such as ``("89", "120")``.
        profile: one of ``PROFILES``.
        batch: most sequences decoded together.
        context: most tokens of a sequence, None for the model's own limit, at most 128k.
        allow_fallback: keep plans in which FP8 products became 16-bit ones.
    """

    sm: tuple[str, ...] = ("89", "120")
    profile: str = "both"
    batch: int = 8
    context: int | None = None
    allow_fallback: bool = False

    def __post_init__(self) -> None:
        """Check the profile.

        Raises:
            HerdError: there is none of that name.
        """
        if self.profile not in PROFILES:
            raise HerdError(f"no profile is called {self.profile!r}: choose one of {', '.join(PROFILES)}")

    @property
    def experts(self) -> type[InPlacePass]:
        """The lowering of routed experts."""
        return PROFILES[self.profile]


def builder_of(target: str, recipe: Recipe, options: PlanOptions) -> Build:
    """What builds the plans of a target, checked before any work is done.

    Raises:
        HerdError: a package is missing, or a compute capability cannot be built for here.
    """
    if target == "tensorrt":
        load_tensorrt()
        return _build_here
    check_targets(options.sm, fp8=recipe.fp8)
    load_tensorrt_rtx()

    def build(onnx: Path, plan: Path, profiles: list[Profile]) -> dict[str, Any]:
        fallback = options.allow_fallback
        return described(build_plan(onnx, plan, sm=options.sm, profiles=profiles, allow_fallback=fallback))

    return build


def _build_here(onnx: Path, plan: Path, profiles: list[Profile]) -> dict[str, Any]:
    build_plan_here(onnx, plan, profiles=profiles)
    return {"tensorrt": load_tensorrt().__version__}


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
    model: ir.Model, directory: Path, role: str, config: HerdConfig, options: PlanOptions, build: Build,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> tuple[str, dict[str, Any]]:
    """Write one graph's plan.

    Args:
        model: lowered, in float32; changed to bfloat16.
        directory: where the plan is written; the ONNX file and its weights lie there meanwhile.
        role: ``decoder`` or ``vision``.
        config: the model's configuration.
        options: what it is built for.
        build: the builder.
        on_bytes: called with the bytes of every weight that was written.

    Returns:
        The plan's file name, and what the manifest says of it.

    Raises:
        HerdError: TensorRT refuses the model, or the plan is not what the model meant.
    """
    ComputeIn(ir.DataType.BFLOAT16)(model)
    onnx, data, plan = (directory / f"{role}.{suffix}" for suffix in ("onnx", "weights", "plan"))
    stream(model, directory, data.name, on_bytes)
    ir.save(model, onnx)
    profiles = profiles_of(config, role, options)
    found = build(onnx, plan, profiles)
    onnx.unlink()
    data.unlink()
    return plan.name, found | {"profiles": [profile.to_json() for profile in profiles]}
