"""The ``herdgraph`` command: build, generate, chat, inspect, verify, bench, upcycle.

Commands import what they need when they run: ``generate`` and ``chat`` work on a machine without torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.progress import Progress

from . import __version__
from .build import main as build
from .console import HerdGroup, emit_json, quantity, size, stderr, table
from .errors import HerdError

if TYPE_CHECKING:
    from .model.config import HerdConfig
    from .runtimes import Engine, Sequence, TextStream

_PATH = click.Path(path_type=Path)


@click.group(cls=HerdGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="herdgraph")
def main() -> None:
    """Compiled graphs for the Llama 4 herd: build a bundle from a checkpoint, run it, check it."""


main.add_command(build, "build")


def _sampling_options(command: Any) -> Any:
    options = (
        click.option("--max-new-tokens", default=256, show_default=True, help="Length limit."),
        click.option("--temperature", default=0.0, show_default=True, help="0 is greedy; the reference uses 0.6."),
        click.option("--top-p", default=1.0, show_default=True, help="Nucleus; the reference uses 0.9."),
        click.option("--top-k", default=0, show_default=True, help="Keep the k most likely tokens, 0 for all."),
        click.option("--seed", type=int, help="Seed of the draws."),
        click.option("--threads", type=int, help="Threads of one operator  [default: one per core]."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@main.command()
@click.argument("bundle", type=_PATH)
@click.option("-p", "--prompt", required=True, help="What to say.")
@click.option("--image", "images", type=_PATH, multiple=True, help="Picture to look at; may be repeated.")
@click.option("--raw", is_flag=True, help="Complete the prompt as it is, without the chat template.")
@click.option("--stop", multiple=True, help="End before this string; may be repeated.")
@_sampling_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of streaming.")
def generate(
    bundle: Path, prompt: str, images: tuple[Path, ...], raw: bool, stop: tuple[str, ...], threads: int | None,
    as_json: bool, **sampling: Any,
) -> None:
    """Answer one prompt with BUNDLE, streaming to the terminal."""
    from .runtimes import Engine

    with stderr.status("checking and loading the bundle"):
        engine = Engine.load(bundle, threads=threads)
    stream = engine.stream(
        prompt if raw else [_user_turn(prompt, images)], images=list(images) if raw and images else None,
        stop=stop, **sampling,
    )
    if as_json:
        for _ in stream:
            pass
        emit_json(_as_json(stream))
        return
    _print_stream(stream)
    _print_timings(stream)


@main.command()
@click.argument("bundle", type=_PATH)
@click.option("--system", help="System message.")
@_sampling_options
def chat(bundle: Path, system: str | None, threads: int | None, **sampling: Any) -> None:
    """Talk with BUNDLE. /image FILE attaches a picture to the next message, /reset forgets, /quit ends."""
    from .runtimes import Engine

    with stderr.status("checking and loading the bundle"):
        engine = Engine.load(bundle, threads=threads)
    opening = [{"role": "system", "content": system}] if system else []
    messages, sequence = list(opening), engine.new_sequence()
    images: list[Path] = []
    stderr.print("[dim]/image FILE, /reset, /quit[/dim]")
    while (line := _read_line()) is not None:
        if line == "/reset":
            messages, images = list(opening), []
        elif line.startswith("/image "):
            images.append(Path(line.removeprefix("/image ").strip()))
        elif line:
            messages.append(_user_turn(line, tuple(images)))
            images = []
            _reply(engine, sequence, messages, sampling)


def _reply(engine: Engine, sequence: Sequence, messages: list[dict[str, Any]], sampling: dict[str, Any]) -> None:
    """Answer the last message; a message that cannot be answered is taken back."""
    try:
        stream = engine.stream(messages, sequence=sequence, **sampling)
        _print_stream(stream)
    except HerdError as error:
        messages.pop()
        stderr.print(f"[red]error: {error}[/red]")
        return
    messages.append({"role": "assistant", "content": stream.result.text})


def _read_line() -> str | None:
    """One line from the user, None to end."""
    try:
        line = input("> ").strip()
    except EOFError:
        return None
    return None if line in ("/quit", "/exit") else line


def _user_turn(text: str, images: tuple[Path, ...]) -> dict[str, Any]:
    if not images:
        return {"role": "user", "content": text}
    parts: list[dict[str, Any]] = [{"type": "image", "path": str(path)} for path in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def _print_stream(stream: TextStream) -> None:
    for piece in stream:
        click.echo(piece, nl=False)
    click.echo()


def _print_timings(stream: TextStream) -> None:
    timings = stream.result.timings
    stderr.print(
        f"[dim]{timings.prompt_tokens} prompt tokens in {timings.prefill_seconds:.2f} s, {timings.new_tokens} new at "
        f"{timings.decode_tokens_per_second:.1f} tokens/s, ended by {stream.result.finish_reason}[/dim]"
    )


def _as_json(stream: TextStream) -> dict[str, Any]:
    result = stream.result
    return {
        "text": result.text,
        "token_ids": result.token_ids,
        "finish_reason": result.finish_reason,
        "timings": vars(result.timings),
    }


@main.command()
@click.argument("path", metavar="CHECKPOINT_OR_BUNDLE", type=_PATH)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def inspect(path: Path, as_json: bool) -> None:
    """Show what a checkpoint or a bundle holds: parameters, layers, experts, cache sizes, files and hashes."""
    from .runtimes.bundle import MANIFEST, Bundle

    if (path / MANIFEST).is_file():
        bundle = Bundle.open(path)
        config, manifest = bundle.manifest.config, bundle.manifest
        about = {"bundle": str(path), "target": manifest.target, "recipe": manifest.recipe, **manifest.source,
                 "toolchain": manifest.toolchain}
        files = {name: (entry.bytes, entry.sha256) for name, entry in manifest.files.items()}
    else:
        from .model.checkpoint import open_checkpoint

        with open_checkpoint(path) as checkpoint:
            config = checkpoint.config
            about = {"checkpoint": str(path), "fingerprint": checkpoint.fingerprint()}
            files = {file.name: (file.stat().st_size, "") for file in checkpoint.weight_files}
    if as_json:
        emit_json({**about, "facts": _facts(config), "config": config.to_json(), "files": files})
        return
    table(str(path), {name: _short(value) for name, value in about.items()} | _described(config))
    table("files", [(name, f"{size(count)}  {digest[:16]}") for name, (count, digest) in files.items()])


def _facts(config: HerdConfig) -> dict[str, int]:
    from .model.facts import facts_of

    return facts_of(config).to_json()


def _short(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def _described(config: HerdConfig) -> dict[str, str]:
    from .model.facts import facts_of

    facts, text, vision = facts_of(config), config.text, config.vision
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
        "KV cache (16 bit)": cache,
        "images": f"{vision.num_layers} layers, {vision.image_size} px tiles of {vision.tokens_per_tile} tokens"
                  if vision else "none",
    }


@main.command()
@click.argument("bundle", type=_PATH)
@click.argument("checkpoint", type=_PATH)
@click.option("-p", "--prompt", help="Text to compare on  [default: random tokens, with an image where possible].")
@click.option("--image", "images", type=_PATH, multiple=True, help="Picture before the prompt; may be repeated.")
@click.option("--tokens", default=128, show_default=True, help="Number of random tokens.")
@click.option("--seed", default=0, show_default=True, help="Seed of the random tokens.")
@click.option("--bound", default=1e-3, show_default=True, help="Largest logit difference that passes.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def verify(
    bundle: Path, checkpoint: Path, prompt: str | None, images: tuple[Path, ...], tokens: int, seed: int, bound: float,
    as_json: bool,
) -> None:
    """Compare the logits of BUNDLE with the torch model of CHECKPOINT. Exits with 1 above the bound.

    The torch model is held in memory in float32 as a whole.
    """
    from .export.verify import compare, random_prompt
    from .model.checkpoint import open_checkpoint
    from .model.herd import Llama4
    from .runtimes import Engine

    if tokens < 2:
        raise HerdError(f"--tokens is {tokens}, at least 2 are needed to compare prefill and decode")
    with stderr.status("checking and loading the bundle"):
        engine = Engine.load(bundle)
    if prompt is None:
        token_ids, pixels = random_prompt(engine.config, tokens, images=1 if engine.config.vision else 0, seed=seed)
    else:
        prepared = engine.processor.prepare([_user_turn(prompt, images)] if images else prompt)
        token_ids, pixels = prepared.token_ids, prepared.pixel_values
    with open_checkpoint(checkpoint) as source:
        if source.config != engine.config:
            raise HerdError(f"{bundle} was built from another configuration than {checkpoint} has: nothing to compare")
        with stderr.status("loading the torch model and comparing"):
            report = compare(engine, Llama4.from_checkpoint(source).eval(), token_ids, pixels)
    passed = max(report.max_difference, report.decode_difference) <= bound
    if as_json:
        emit_json({**report.to_json(), "bound": bound, "passed": passed})
    else:
        table("fidelity to the torch model", {name: f"{value:.3g}" for name, value in report.to_json().items()})
    if not passed:
        found = max(report.max_difference, report.decode_difference)
        raise HerdError(f"the largest logit difference is {found:.3g}, the bound is {bound:.3g}")


@main.command()
@click.argument("bundle", type=_PATH)
@click.option("--prompt", default=512, show_default=True, help="Tokens of the prompt.")
@click.option("--new", default=32, show_default=True, help="Tokens to decode.")
@click.option("--context", type=int, help="Tokens before the decoded ones  [default: those of the prompt].")
@click.option("--repeats", default=3, show_default=True, help="Repetitions; medians are reported.")
@click.option("--threads", type=int, help="Threads of one operator  [default: one per core].")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def bench(bundle: Path, as_json: bool, **options: Any) -> None:
    """Measure prefill and decode of BUNDLE, and their shares of what this machine can do, measured in the same run."""
    from .runtimes.bench import bench as run

    with stderr.status("measuring"):
        report = run(bundle, **options)
    if as_json:
        emit_json(report.to_json())
        return
    prefill, decode, limit = report.prefill, report.decode, report.ceilings
    table(f"{bundle}, {report.prompt_tokens} prompt tokens, decoding at {report.context}", {
        "load": f"{report.load_seconds:.2f} s",
        "time to first token": f"{report.first_token_seconds:.3f} s",
        "prefill": f"{prefill.median:.1f} tokens/s ({prefill.low:.1f} to {prefill.high:.1f}), "
                   f"{report.prefill_share:.2f} of the fp32 GEMM ceiling",
        "decode": f"{decode.median:.1f} tokens/s ({decode.low:.1f} to {decode.high:.1f}), "
                  f"{report.decode_share:.2f} of the read bandwidth",
        "peak memory": size(report.peak_bytes),
        "ceilings": f"{limit.read_bandwidth / 1e9:.1f} GB/s read, {limit.fp32_gemm / 1e9:.0f} GFLOP/s fp32, "
                    f"{limit.int8_gemm / 1e9:.0f} GOP/s int8",
    })


@main.command()
@click.argument("source", type=_PATH)
@click.option("-o", "--output", type=_PATH, required=True, help="Checkpoint directory to create.")
@click.option("--experts", default=4, show_default=True, help="Routed experts of a mixture layer.")
@click.option("--mode", type=click.Choice(["shared", "split"]), default="shared", show_default=True,
              help="shared: the shared expert is the whole FFN, routed experts start silent. "
                   "split: routed experts carry the second half of the FFN.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True)
@click.option("--seed", default=0, show_default=True, help="Seed of new weights.")
@click.option("--overwrite", is_flag=True, help="Replace an existing checkpoint.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def upcycle(source: Path, output: Path, as_json: bool, **options: Any) -> None:
    """Turn SOURCE, a dense Llama-family model (GGUF file or Hugging Face directory), into a Llama 4 checkpoint.

    The function of the dense model is kept; training then lets the experts specialise.
    """
    from .model.upcycle import upcycle as run

    with Progress(console=stderr, disable=as_json, transient=True) as bar:
        task = bar.add_task("reading the dense model", total=None)
        report = run(source, output, on_tensor=lambda done, total: bar.update(
            task, description="writing experts and the rest", completed=done, total=total), **options)
    if as_json:
        emit_json(report.to_json())
    else:
        stderr.print(f"[green]wrote[/green] {output}: {quantity(report.total)} parameters, "
                     f"{quantity(report.active)} active per token")
