"""The inspect command: what a checkpoint, a bundle or a plan holds."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..console import HerdCommand, emit_json, quantity, size, table

if TYPE_CHECKING:
    from ..export.targets.tensorrt import Plan
    from ..model.config import HerdConfig

PLAN = ".plan"


@click.command(cls=HerdCommand)
@click.argument("path", metavar="CHECKPOINT_OR_BUNDLE_OR_PLAN", type=click.Path(path_type=Path))
@click.option("--products", is_flag=True, help="Of plans: every matrix product instead of a count.")
@click.option("--passes", is_flag=True,
              help="The passes that made a bundle, in order. TARGET or TARGET:RECIPE may stand for the bundle.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def inspect(path: Path, products: bool, passes: bool, as_json: bool) -> None:
    """Show what a checkpoint, a bundle or a TensorRT plan holds.

    Parameters, layers, experts, cache sizes, files and hashes; of a plan its GPUs, inputs, outputs and the types that
    its matrix products really have.
    """
    from ..runtimes.bundle.manifest import MANIFEST

    if passes:
        _show_passes(path, as_json)
    elif path.suffix == PLAN and path.is_file():
        _show_plan(path, products, as_json)
    elif (path / MANIFEST).is_file():
        _show_bundle(path, products, as_json)
    else:
        _show_checkpoint(path, as_json)


def _show_passes(path: Path, as_json: bool) -> None:
    """Show the pipeline of a bundle's target and recipe, or of those that were named."""
    from ..export.targets.describe import described_passes
    from ..export.targets.registry import TARGETS, target_of
    from ..runtimes.bundle.manifest import Bundle

    name, _, recipe = str(path).partition(":")
    if name not in TARGETS or path.exists():
        manifest = Bundle.open(path, verify=False).manifest
        name, recipe = manifest.target, manifest.recipe
    target, precision = target_of(name, recipe or TARGETS[name].recipes[0])
    rows = described_passes(target, precision)
    if as_json:
        emit_json({"target": name, "recipe": precision.name,
                   "passes": [{"name": each, "purpose": purpose} for each, purpose in rows]})
        return
    table(f"passes of target {name}, recipe {precision.name}",
          [(f"{number}. {each}", purpose) for number, (each, purpose) in enumerate(rows, 1)])


def _show_bundle(path: Path, products: bool, as_json: bool) -> None:
    from ..runtimes.bundle.manifest import Bundle

    bundle = Bundle.open(path)
    manifest = bundle.manifest
    about = {"bundle": str(path), "format": manifest.format, "target": manifest.target, "recipe": manifest.recipe,
             "graphs": manifest.graphs, **({"shards": str(manifest.shards.plan)} if manifest.shards else {}),
             **manifest.source, "toolchain": manifest.toolchain}
    files = {name: (entry.bytes, entry.sha256) for name, entry in manifest.files.items()}
    _show(str(path), about | ({"plans": manifest.plans} if as_json and manifest.plans else {}), manifest.config, files,
          as_json)
    if not as_json and manifest.target == "tensorrt-rtx":
        for role in manifest.plans:
            _show_plan(bundle.directory / f"{role}{PLAN}", products, as_json)


def _show_checkpoint(path: Path, as_json: bool) -> None:
    from ..model.checkpoint import open_checkpoint

    with open_checkpoint(path) as checkpoint:
        about = {"checkpoint": str(path), "fingerprint": checkpoint.fingerprint()}
        files = {file.name: (file.stat().st_size, "") for file in checkpoint.weight_files}
        _show(str(path), about, checkpoint.config, files, as_json)


def _show(
    title: str, about: dict[str, Any], config: HerdConfig, files: dict[str, tuple[int, str]], as_json: bool
) -> None:
    if as_json:
        emit_json({**about, "facts": _facts(config), "config": config.to_json(), "files": files})
        return
    table(title, {name: _short(value) for name, value in about.items()} | _described(config))
    table("files", [(name, f"{size(count)}  {digest[:16]}".rstrip()) for name, (count, digest) in files.items()])


def _show_plan(path: Path, products: bool, as_json: bool) -> None:
    from ..export.targets.tensorrt import Plan
    from ..export.targets.tensorrt.plan import VERSION

    plan = Plan.read(path)
    rows = [{"layers": list(gemm.layers), "profile": gemm.profile, "left": _tensor(gemm.a), "right": _tensor(gemm.b),
             "result": _tensor(gemm.output), "alpha": gemm.alpha} for gemm in plan.gemms]
    if as_json:
        emit_json({
            "plan": str(path), "tensorrt": VERSION, "bytes": plan.bytes, "sm": list(plan.targets),
            "constants": dict(plan.constant_bytes()), "products": rows,
            "inputs": {name: _tensor(tensor) for name, tensor in plan.inputs.items()},
            "outputs": {name: _tensor(tensor) for name, tensor in plan.outputs.items()},
        })
        return
    table(str(path), {
        "TensorRT-RTX": VERSION, "SM": ", ".join(plan.targets), "size": size(plan.bytes),
        "constants": ", ".join(f"{size(count)} {dtype}" for dtype, count in plan.constant_bytes().most_common()),
        "profiles": len(plan.profiles), "matrix products": _counts(plan),
    })
    for title, tensors in (("inputs", plan.inputs), ("outputs", plan.outputs)):
        table(title, _grouped({name: _tensor(tensor) for name, tensor in tensors.items()}))
    if products:
        table("matrix products", [(next(iter(gemm.layers), "(fused)"), f"{_tensor(gemm.a)} x {_tensor(gemm.b)} -> "
                                   f"{_tensor(gemm.output)}, profile {gemm.profile}") for gemm in plan.gemms])


def _grouped(rows: dict[str, str]) -> list[tuple[str, str]]:
    """Rows of equal content whose names differ in a number only, as one."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, text in rows.items():
        groups.setdefault((re.sub(r"\d+", "*", name), text), []).append(name)
    return [(pattern if len(names) > 1 else names[0], f"{text} ({len(names)} of them)" if len(names) > 1 else text)
            for (pattern, text), names in groups.items()]


def _counts(plan: Plan) -> str:
    """How many products there are of each pair of types, in all profiles together."""
    found = Counter(f"{gemm.a.dtype} x {gemm.b.dtype}" for gemm in plan.gemms)
    return ", ".join(f"{count} {kind}" for kind, count in found.most_common())


def _tensor(tensor: Any) -> str:
    """Type and shape; sizes that are known when it runs are ``?``."""
    return f"{tensor.dtype}[{', '.join(dim if dim.isdigit() else '?' for dim in tensor.dims)}]"


def _facts(config: HerdConfig) -> dict[str, int]:
    from ..model.config.parameter_counts import model_size

    return model_size(config).to_json()


def _short(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def _described(config: HerdConfig) -> dict[str, str]:
    from ..model.config.parameter_counts import model_size

    facts, text, vision = model_size(config), config.text, config.vision
    local = sum(1 for layer in range(text.num_layers) if text.chunk_of(layer))
    moe = f"{len(text.moe_layers)} layers x {text.num_experts}, top-{text.top_k}, plus a shared one"
    kinds = f"{text.num_layers - local} global, {local} in chunks of {text.attention_chunk_size}" if local else "global"
    cache = f"{size(facts.kv_global_bytes)} per token"
    if local:
        cache += f" global, {size(facts.kv_local_bytes)} local up to {size(facts.kv_local_cap_bytes)}"
    return {
        "parameters": f"{quantity(facts.total)} total, {quantity(facts.active)} active per text token",
        "layers": f"{text.num_layers} ({kinds}), width {text.hidden_size}",
        "experts": moe if text.moe_layers else "none",
        "attention": f"{text.num_heads} heads, {text.num_kv_heads} key/value heads of {text.head_dim}",
        "context": f"{text.max_position_embeddings} tokens, vocabulary {text.vocab_size}",
        "KV cache (at 16 bit)": cache,
        "images": f"{vision.num_layers} layers, {vision.image_size} px tiles of {vision.tokens_per_tile} tokens"
                  if vision else "none",
    }
