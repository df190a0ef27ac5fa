"""The ``herdgraph`` command: build, calibrate, train, generate, chat, run, inspect, plan, verify, bench, upcycle.

Commands import what they need when they run: ``generate`` and ``chat`` work on a machine without torch.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

from .. import __version__
from ..build import main as build
from ..calibration.cli import calibrate
from ..console import HerdGroup, emit_json, print_error, progress, quantity, size, stderr, succeed, table
from ..errors import HerdError
from .inspect import inspect
from .plan import plan
from .train import train

if TYPE_CHECKING:
    from ..runtimes import Engine, Generation, TextStream
    from ..runtimes.engine import Memory

_PATH = click.Path(path_type=Path)
_COUNT = click.IntRange(min=1)
_THREADS = click.option("--threads", type=click.IntRange(1, 1024), show_default="one per core",
                        help="Threads of one operator, on every rank.")
_MEMORY = click.option("--memory", type=click.Choice(["fast", "low"]), default="fast", show_default=True,
                       help="low: use weights as they lie on disk, read only when needed; slower.")


@click.group(cls=HerdGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="herdgraph")
def main() -> None:
    """Compiled graphs for the Llama 4 herd: build a bundle from a checkpoint, run it, check it."""


main.add_command(build, "build")
main.add_command(calibrate)
main.add_command(inspect)
main.add_command(plan)
main.add_command(train)


def _sampling_options(command: Any) -> Any:
    options = (
        click.option("--max-new-tokens", type=_COUNT, default=256, show_default=True, help="Length limit."),
        click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True,
                     help="0 is greedy; the reference uses 0.6."),
        click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True,
                     help="Nucleus; the reference uses 0.9."),
        click.option("--top-k", type=click.IntRange(min=0), default=0, show_default=True,
                     help="Keep the k most likely tokens, 0 for all."),
        click.option("--seed", type=click.IntRange(min=0), show_default="another each time", help="Seed of the draws."),
        _THREADS,
        _MEMORY,
    )
    for option in reversed(options):
        command = option(command)
    return command


@main.command()
@click.argument("bundle", type=_PATH)
@click.option("-p", "--prompt", required=True, help="What to say.")
@click.option("--image", "images", type=_PATH, multiple=True,
              help="Picture to look at; may be repeated. With --raw, the prompt says where by <|image|>.")
@click.option("--raw", is_flag=True, help="Complete the prompt as it is, without the chat template.")
@click.option("--stop", multiple=True, help="End before this string; may be repeated.")
@_sampling_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of streaming.")
def generate(
    bundle: Path, prompt: str, images: tuple[Path, ...], raw: bool, stop: tuple[str, ...], threads: int | None,
    memory: Memory, as_json: bool, **sampling: Any,
) -> None:
    """Answer one prompt with BUNDLE."""
    engine = _loaded(bundle, threads, memory, sampling)
    stream = engine.stream(
        prompt if raw else [_user_turn(prompt, images)], images=list(images) if raw and images else None,
        stop=stop, **sampling,
    )
    if as_json:
        for _ in stream:
            pass
        emit_json(_as_json(stream.result))
        return
    _print_stream(stream)
    _print_timings(stream)


def _loaded(bundle: Path, threads: int | None, memory: Memory, sampling: dict[str, Any]) -> Engine:
    """A loaded bundle, after options that it would refuse later were refused."""
    from ..runtimes import Engine
    from ..runtimes.generation.sampling import Sampling

    Sampling(**{name: value for name, value in sampling.items() if name != "max_new_tokens"})
    with stderr.status("checking and loading the bundle"):
        return Engine.load(bundle, threads=threads, memory=memory)


@main.command()
@click.argument("bundle", type=_PATH)
@click.argument("prompts", metavar="PROMPT...", nargs=-1, required=True)
@click.option("--replicas", type=_COUNT, default=1, show_default=True, help="Engines that share the prompts.")
@click.option("--cluster", metavar="ADDRESS", help="A running Ray cluster; without it Ray runs on this machine.")
@click.option("--raw", is_flag=True, help="Complete the prompts as they are, without the chat template.")
@_sampling_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def run(
    bundle: Path, prompts: tuple[str, ...], replicas: int, cluster: str | None, raw: bool, threads: int | None,
    memory: Memory, as_json: bool, **sampling: Any,
) -> None:
    """Answer prompts with replicas of BUNDLE on a Ray cluster.

    Every prompt goes to the least busy replica; one that dies is started again.
    """
    from ..runtimes.generation.sampling import Sampling
    from ..runtimes.server.replicas import Cluster, ClusterOptions

    Sampling(**{name: value for name, value in sampling.items() if name != "max_new_tokens"})
    options = ClusterOptions(replicas, cluster, threads=threads or 1, memory=memory)
    with stderr.status("starting replicas"):
        handle = Cluster(bundle, options)
    with handle:
        answers = handle.generate_all([text if raw else [_user_turn(text, ())] for text in prompts], **sampling)
    if as_json:
        emit_json([_as_json(answer) for answer in answers])
        return
    for answer in answers:
        click.echo(answer.text)


@main.command()
@click.argument("bundle", type=_PATH)
@click.option("--system", help="System message.")
@_sampling_options
def chat(bundle: Path, system: str | None, threads: int | None, memory: Memory, **sampling: Any) -> None:
    """Talk with BUNDLE.

    /image FILE attaches a picture to the next message, /reset forgets, /quit ends.
    """
    engine = _loaded(bundle, threads, memory, sampling)
    talk = ChatSession(engine, system, sampling)
    if isinstance(sys.stdin, TextIOWrapper):  # bytes that are not text are refused with their message
        sys.stdin.reconfigure(errors="surrogateescape")
    stderr.print("[dim]/image FILE, /reset, /quit[/dim]")
    while (line := _read_line()) is not None:
        try:
            talk.hear(line)
        except HerdError as error:
            print_error(str(error))


class ChatSession:
    """What was said on the terminal, and the pictures that go with the next message.

    Args:
        engine: answers.
        system: system message, None for none.
        sampling: options of ``Engine.stream``.

    Raises:
        HerdError: the bundle has no tokenizer or chat template, or the system message is not text.
    """

    def __init__(self, engine: Engine, system: str | None, sampling: dict[str, Any]) -> None:
        self._engine, self._sampling = engine, sampling
        self._opening = [{"role": "system", "content": system}] if system else []
        self._sequence = engine.new_sequence()
        self._forget()
        engine.processor.template.encode([*self._opening, _user_turn("Hello", ())], engine.processor.tokenizer)

    def hear(self, line: str) -> None:
        """Do what a line says, or answer it.

        Raises:
            HerdError: it cannot be done; the conversation stays as it was.
        """
        word, _, rest = line.partition(" ")
        if word == "/reset":
            self._forget()
        elif word == "/image":
            self._attach(rest.strip())
        elif re.fullmatch(r"/\w+", word):
            raise HerdError(f"there is no command {word}: use /image FILE, /reset or /quit")
        elif line:
            self._answer(line)

    def _forget(self) -> None:
        self._messages: list[dict[str, Any]] = list(self._opening)
        self._images: list[Any] = []

    def _attach(self, name: str) -> None:
        from ..model.processing.images import load_image

        if not name:
            raise HerdError("/image needs the name of a file: /image FILE")
        assert self._engine.processor.image_processor, "models without images were refused"
        self._images.append(load_image(name))

    def _answer(self, line: str) -> None:
        """Answer a message; one that cannot be answered is taken back."""
        messages = [*self._messages, _user_turn(line, self._images)]
        stream = self._engine.stream(messages, sequence=self._sequence, **self._sampling)
        _print_stream(stream)
        self._messages = [*messages, {"role": "assistant", "content": stream.result.text}]
        self._images = []


def _read_line() -> str | None:
    """One line from the user, None to end."""
    try:
        line = input("> ").strip()
    except EOFError:
        return None
    return None if line in ("/quit", "/exit") else line


def _user_turn(text: str, images: Sequence[Any]) -> dict[str, Any]:
    if not images:
        return {"role": "user", "content": text}
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def _print_stream(stream: TextStream) -> None:
    for piece in stream:
        click.echo(piece, nl=False)
    click.echo()


def _print_timings(stream: TextStream) -> None:
    timings = stream.result.timings
    stderr.print(
        f"[dim]{timings.prompt_tokens} prompt tokens in {timings.prefill_seconds:.2f} s, {timings.new_tokens} new at "
        f"{timings.decode_tokens_per_second:.1f} tokens/s, ended by {stream.result.finish_reason}[/dim]", soft_wrap=True
    )


def _as_json(result: Generation) -> dict[str, Any]:
    return {
        "text": result.text,
        "token_ids": result.token_ids,
        "finish_reason": result.finish_reason,
        "timings": vars(result.timings),
    }


@main.command()
@click.argument("bundle", type=_PATH)
@click.argument("checkpoint", type=_PATH)
@click.option("-p", "--prompt", show_default="random tokens, with an image where possible", help="Text to compare on.")
@click.option("--image", "images", type=_PATH, multiple=True,
              help="Picture before the prompt; may be repeated, needs -p.")
@click.option("--tokens", type=click.IntRange(min=2), default=128, show_default=True, help="Number of random tokens.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the random tokens.")
@click.option("--bound", type=click.FloatRange(min=0), default=1e-3, show_default=True,
              help="Largest logit difference that passes.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def verify(
    bundle: Path, checkpoint: Path, prompt: str | None, images: tuple[Path, ...], tokens: int, seed: int, bound: float,
    as_json: bool,
) -> None:
    """Compare BUNDLE with the torch model of CHECKPOINT.

    Exits with 1 when a logit differs by more than the bound. The torch model is held in memory in float32 as a whole.
    """
    from ..export.verify import compare, random_prompt
    from ..model.checkpoint import open_checkpoint
    from ..model.llama4.model import Llama4
    from ..runtimes import Engine

    if images and prompt is None:
        raise HerdError("--image needs a prompt: give one with -p, or no image")
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
@click.option("--prompt", type=_COUNT, default=512, show_default=True, help="Tokens of the prompt.")
@click.option("--new", type=_COUNT, default=32, show_default=True, help="Tokens to decode.")
@click.option("--context", type=_COUNT, show_default="those of the prompt", help="Tokens before the decoded ones.")
@click.option("--batch", type=_COUNT, default=1, show_default=True, help="Sequences decoded together, besides one.")
@click.option("--repeats", type=_COUNT, default=3, show_default=True, help="Repetitions; medians are reported.")
@_THREADS
@_MEMORY
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def bench(bundle: Path, as_json: bool, **options: Any) -> None:
    """Measure how fast BUNDLE is.

    Prefill and decode rates, and their utilization of this machine's peaks, measured in the same run.
    """
    from ..runtimes.benchmark.bench import bench as run

    with stderr.status("measuring"):
        report = run(bundle, **options)
    if as_json:
        emit_json(report.to_json())
        return
    prefill, decode, limit = report.prefill, report.decode, report.peaks
    table(f"{bundle}, {report.prompt_tokens} prompt tokens, decoding at {report.context}", {
        "load": f"{report.load_seconds:.2f} s",
        "time to first token": f"{report.first_token_seconds:.3f} s",
        "prefill": f"{prefill.median:.1f} tokens/s ({prefill.low:.1f} to {prefill.high:.1f}), "
                   f"{report.prefill_utilization:.2f} of the fp32 GEMM peak",
        "decode": f"{decode.median:.1f} tokens/s ({decode.low:.1f} to {decode.high:.1f}), "
                  f"{report.decode_utilization:.2f} of the read bandwidth",
        **({f"decode, {report.batch} together": f"{both.median:.1f} tokens/s ({both.low:.1f} to {both.high:.1f})"}
           if (both := report.batch_decode) else {}),
        "peak memory": size(report.peak_bytes),
        "peaks": f"{limit.read_bandwidth / 1e9:.1f} GB/s read, {limit.fp32_gemm / 1e9:.0f} GFLOP/s fp32, "
                    f"{limit.int8_gemm / 1e9:.0f} GOP/s int8",
    })


@main.command()
@click.argument("source", type=_PATH)
@click.option("-o", "--output", type=_PATH, required=True, help="Checkpoint directory to create.")
@click.option("--experts", type=_COUNT, default=4, show_default=True,
              help="Routed experts of a mixture layer; an even number in split mode.")
@click.option("--mode", type=click.Choice(["shared", "split"]), default="shared", show_default=True,
              help="shared: the shared expert is the whole FFN, routed experts start silent. "
                   "split: routed experts carry the second half of the FFN.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True,
              help="Type of the weights that are written.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of new weights.")
@click.option("--overwrite", is_flag=True, help="Replace an existing checkpoint.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def upcycle(source: Path, output: Path, as_json: bool, **options: Any) -> None:
    """Turn a dense Llama into a Llama 4 checkpoint.

    SOURCE is a dense Llama-family model: a GGUF file or a Hugging Face directory. Its function is kept; training then
    lets the experts specialise.
    """
    from ..model.upcycle import upcycle as run

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with progress(*columns, quiet=as_json) as bar:
        task = bar.add_task("reading the dense model", total=None)
        report = run(source, output, on_tensor=lambda done, total: bar.update(
            task, description="writing experts and the rest", completed=done, total=total), **options)
    if as_json:
        emit_json(report.to_json())
    else:
        succeed("wrote", f"{output}: {quantity(report.total)} parameters, {quantity(report.active)} active per token")
