"""The serve command: OpenAI's API on a bundle."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import __version__
from ..console import HerdCommand, stderr, succeed
from ..errors import HerdError
from ..options import COUNT, PATH, Integer, Number, context_option
from .options import device_option, memory_option, threads_option

if TYPE_CHECKING:
    from ..runtimes.executors.options import Memory
    from ..runtimes.scheduler import Service
    from ..runtimes.server.options import ServerOptions
    from ..runtimes.server.serving import Serving


@click.command(cls=HerdCommand)
@click.argument("bundle", type=PATH)
@click.option("--host", default="127.0.0.1", show_default=True, help="Interface; 0.0.0.0 is all of them.")
@click.option("--port", type=Integer(0, 65535), default=8000, show_default=True, help="0 takes any that is free.")
@click.option("--name", "names", multiple=True, show_default="the bundle's directory",
              help="The model's name in requests; may be repeated.")
@click.option("--api-keys", type=PATH, metavar="FILE",
              help="Keys that may ask, one a line, as they are or as sha256:HEX, with a name after a space; it is read "
                   "again when it changes. Without it everybody may.")
@context_option("Most tokens of a prompt and its answer", show_default="the model's own limit")
@click.option("--sequences", type=COUNT, default=64, show_default=True, help="Answers generated at the same time.")
@click.option("--cache-bytes", type=Integer(min=1), show_default="half of the free memory",
              help="Bytes of keys and values of all answers, on every rank.")
@device_option
@click.option("--gpu-memory", type=Integer(min=1), show_default="nine tenths of what is free",
              help="Bytes of the GPU for weights, keys and values, and calls together.")
@click.option("--speculate", metavar="HOW", default="lookup", show_default=True,
              help="How next tokens are guessed, to be verified several in a call: lookup (where the text repeats "
                   "itself), none, or the path of a smaller bundle with the same tokenizer. Answers stay the same.")
@click.option("--replicas", type=COUNT, default=1, show_default=True,
              help="Engines behind the address, on Ray Serve where there are several.")
@click.option("--cluster", metavar="ADDRESS", show_default="this machine", help="A running Ray cluster for replicas.")
@click.option("--image-hosts", metavar="HOST", multiple=True, show_default="none",
              help="Host whose pictures and videos are fetched, a name or *.name; may be repeated.")
@click.option("--cors-origins", metavar="ORIGIN", multiple=True, show_default="none",
              help="Web pages of this origin may ask; may be repeated.")
@click.option("--otlp-traces-endpoint", metavar="URL", show_default="none",
              help="Takes a span of OpenTelemetry per request by OTLP over HTTP, such as "
                   "http://localhost:4318/v1/traces.")
@click.option("--tool-format", type=click.Choice(["pythonic", "json"]), show_default="that of its chat template",
              help="How the model writes calls of tools.")
@click.option("--drain-timeout", type=Number(min=0), default=30.0, show_default=True,
              help="Seconds that running requests get after SIGTERM or Ctrl-C; a second signal ends them at once.")
@threads_option
@memory_option
def serve(
    bundle: Path, host: str, port: int, names: tuple[str, ...], api_keys: Path | None, context: int | None,
    sequences: int, cache_bytes: int | None, device: str | None, gpu_memory: int | None, speculate: str,
    replicas: int, cluster: str | None, image_hosts: tuple[str, ...], cors_origins: tuple[str, ...],
    otlp_traces_endpoint: str | None,
    tool_format: str | None, drain_timeout: float, threads: int | None, memory: Memory,
) -> None:
    """Answer requests in OpenAI's form with BUNDLE, many at a time.

    /v1/chat/completions, /v1/completions, /v1/responses, /v1/messages, /v1/models, /metrics and a page to chat with
    are at the address that is printed. One line of JSON per request goes to the standard output, without its texts.
    """
    from ..runtimes.bundle.manifest import Bundle
    from ..runtimes.server.options import ServerOptions

    Bundle.open(bundle, verify=False)
    options = ServerOptions(
        names=names or (bundle.resolve().name,), version=__version__, context=context, api_keys=api_keys,
        image_hosts=image_hosts, cors_origins=cors_origins, otlp_traces_endpoint=otlp_traces_endpoint,
        tool_format=tool_format)
    loaded = {"threads": threads, "memory": memory, "cache_bytes": cache_bytes}
    on_gpu = {"device": device, "gpu_memory": gpu_memory}
    if replicas > 1 or cluster:
        if device or gpu_memory:
            raise HerdError("--device and --gpu-memory are for one engine, replicas take the first GPU that Ray gives "
                            "them: leave them out")
        limits = {"sequences": sequences, "drain": drain_timeout, "speculate": speculate}
        _serve_replicas(bundle, options, {**loaded, **limits, "replicas": replicas, "address": cluster}, host, port)
    else:
        _serve_here(bundle, options, loaded | on_gpu, sequences, speculate, (host, port), drain_timeout)


def _serve_here(
    bundle: Path, options: ServerOptions, loaded: dict[str, Any], sequences: int, speculate: str,
    place: tuple[str, int], drain_timeout: float,
) -> None:
    """Listen, load the model in this process, answer until a signal comes, and let running requests end."""
    from ..runtimes import Engine
    from ..runtimes.scheduler import Service, ServiceOptions, drafter_of
    from ..runtimes.server.app import create_app
    from ..runtimes.server.listen import HttpServer, listening

    app = create_app(None, replace(options, request_log=sys.stdout))
    serving: Serving = app.state.serving
    with HttpServer(app, listening(*place)) as server:
        with stderr.status("checking and loading the bundle"):
            engine = Engine.load(bundle, **loaded)
            drafter = drafter_of(speculate, engine, threads=loaded["threads"])
        with Service(engine, ServiceOptions(sequences=sequences), drafter=drafter) as service, _first_signal() as asked:
            serving.open(service)
            succeed("serving", f"{serving.model} at {server.url}")
            _wait(asked, lambda: server.alive)
            _drain(serving, service, drain_timeout)


def _serve_replicas(bundle: Path, options: ServerOptions, started: dict[str, Any], host: str, port: int) -> None:
    """Let Ray Serve keep replicas running until a signal comes."""
    from ..runtimes.server.cluster_options import ClusterOptions
    from ..runtimes.server.replicas import Cluster

    started["threads"] = started["threads"] or 1
    with stderr.status("starting replicas"):
        cluster = Cluster(bundle, ClusterOptions(**started), server=options, host=host, port=port)
    with cluster, _first_signal() as asked:
        succeed("serving", f"{options.names[0]} at http://{host}:{port} with {started['replicas']} replicas")
        _wait(asked, lambda: True)


def _wait(asked: threading.Event, is_alive: Callable[[], bool]) -> None:
    while not asked.wait(1.0):
        if not is_alive():
            raise HerdError("the HTTP server ended by itself: see the log above")


def _drain(serving: Serving, service: Service, timeout: float) -> None:
    serving.drain()
    with stderr.status("ending: running requests get their answers"):
        service.drain(timeout)


@contextmanager
def _first_signal() -> Iterator[threading.Event]:
    """An event that the first signal sets; the second one unwinds the stack."""
    asked = threading.Event()

    def handle(number: int, _frame: object) -> None:
        if asked.is_set():
            sys.exit(128 + number)
        asked.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
