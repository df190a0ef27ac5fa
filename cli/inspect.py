"""The inspect command: what a checkpoint, a bundle or a plan holds."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..console import HerdCommand, emit_json, quantity, size, table
from ..options import PATH, json_option

if TYPE_CHECKING:
    from ..export.inspection import BundleDescription, CheckpointDescription, PipelineDescription
    from ..export.plan_description import PlanDescription
    from ..model.config import HerdConfig
    from ..model.config.parameter_counts import ModelSize


@click.command(cls=HerdCommand)
@click.argument("path", metavar="CHECKPOINT_OR_BUNDLE_OR_PLAN", type=PATH)
@click.option("--products", is_flag=True, help="Of plans: every matrix product instead of a count.")
@click.option("--passes", is_flag=True,
              help="The passes that made a bundle, in order. TARGET or TARGET:RECIPE may stand for the bundle.")
@json_option
def inspect(path: Path, products: bool, passes: bool, as_json: bool) -> None:
    """Show what a checkpoint, a bundle or a TensorRT plan holds.

    Parameters, layers, experts, cache sizes, sampling defaults, files and hashes; of a plan its GPUs, inputs, outputs
    and the types that its matrix products really have. A preset such as scout or maverick, or the name of a released
    model, shows the configuration.
    """
    from ..export import inspection, plan_description

    found = inspection.describe_pipeline(str(path)) if passes else inspection.describe(path)
    if as_json:
        emit_json(found.to_json())
        return
    match found:
        case inspection.PipelineDescription():
            _show_pipeline(found)
        case plan_description.PlanDescription():
            _show_plan(found, products)
        case inspection.BundleDescription():
            _show_bundle(found)
            for plan in found.plan_files:
                _show_plan(plan_description.describe_plan(plan), products)
        case inspection.PresetDescription():
            table(f"{found.name} (a configuration, no weights)", _described(found.config, found.size))
        case _:
            _show_checkpoint(found)


def _show_pipeline(pipeline: PipelineDescription) -> None:
    table(f"passes of target {pipeline.target}, recipe {pipeline.recipe}",
          [(f"{number}. {name}", purpose) for number, (name, purpose) in enumerate(pipeline.passes, 1)])


def _show_bundle(bundle: BundleDescription) -> None:
    origin = {name: _short(value) for name, value in bundle.origin().items()}
    described = _described(bundle.manifest.config, bundle.size, bundle.caches or "at 16 bit")
    table(str(bundle.path), origin | described | {"sampling": bundle.sampling})
    if bundle.manifest.bits:
        table("bits of weights", _grouped({name: f"{bits} bits" for name, bits in bundle.manifest.bits.items()}))
    table("files", [(name, f"{size(entry.bytes)}  {entry.sha256[:16]}")
                    for name, entry in bundle.manifest.files.items()])


def _show_checkpoint(checkpoint: CheckpointDescription) -> None:
    origin = {"checkpoint": str(checkpoint.path), "fingerprint": checkpoint.fingerprint}
    table(str(checkpoint.path), origin | _described(checkpoint.config, checkpoint.size) | {
        "sampling": checkpoint.sampling})
    table("files", [(name, size(count)) for name, count in checkpoint.files.items()])


def _show_plan(plan: PlanDescription, products: bool) -> None:
    table(str(plan.path), {
        "TensorRT-RTX": plan.tensorrt, "SM": ", ".join(plan.sm), "size": size(plan.bytes),
        "constants": ", ".join(f"{size(count)} {dtype}" for dtype, count in plan.constants.most_common()),
        "profiles": plan.profiles, "matrix products": _counts(plan),
    })
    for title, tensors in (("inputs", plan.inputs), ("outputs", plan.outputs)):
        table(title, _grouped(tensors))
    if products:
        table("matrix products", [
            (next(iter(product.layers), "(fused)"),
             f"{product.left} x {product.right} -> {product.result}, profile {product.profile}")
            for product in plan.products
        ])


def _grouped(rows: dict[str, str]) -> list[tuple[str, str]]:
    """Rows of equal content whose names differ in a number only, as one."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, text in rows.items():
        groups.setdefault((re.sub(r"\d+", "*", name), text), []).append(name)
    return [(pattern if len(names) > 1 else names[0], f"{text} ({len(names)} of them)" if len(names) > 1 else text)
            for (pattern, text), names in groups.items()]


def _counts(plan: PlanDescription) -> str:
    """How many products there are of each pair of types, in all profiles together."""
    found = Counter(" x ".join(operand.partition("[")[0] for operand in (product.left, product.right))
                    for product in plan.products)
    return ", ".join(f"{count} {kind}" for kind, count in found.most_common())


def _short(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def _described(config: HerdConfig, parameters: ModelSize, caches: str = "at 16 bit") -> dict[str, str]:
    text, vision = config.text, config.vision
    local = sum(1 for layer in range(text.num_layers) if text.chunk_of(layer))
    moe = f"{len(text.moe_layers)} layers x {text.num_experts}, top-{text.top_k}, plus a shared one"
    kinds = f"{text.num_layers - local} global, {local} in chunks of {text.attention_chunk_size}" if local else "global"
    cache = f"{size(parameters.kv_global_bytes)} per token"
    if local:
        cache += f" global, {size(parameters.kv_local_bytes)} local up to {size(parameters.kv_local_cap_bytes)}"
    return {
        "parameters": f"{quantity(parameters.total)} total, {quantity(parameters.active)} active per text token",
        "layers": f"{text.num_layers} ({kinds}), width {text.hidden_size}",
        "experts": moe if text.moe_layers else "none",
        "attention": f"{text.num_heads} heads, {text.num_kv_heads} key/value heads of {text.head_dim}",
        "context": f"{text.max_position_embeddings} tokens, vocabulary {text.vocab_size}",
        f"KV cache ({caches})": cache,
        "images": f"{vision.num_layers} layers, {vision.image_size} px tiles of {vision.tokens_per_tile} tokens"
                  if vision else "none",
    }
