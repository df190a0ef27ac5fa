"""``herdgraph serve`` beside llama.cpp's server: the same weights, the same token ids, alternating in one run.

    python -m benchmarks.serving BUNDLE [--opponent llama.cpp=SERVER:GGUF] [--clients 1 4 16 64] [--threads 2]
        [--rounds 1] [--scenarios plain shared mixed] [--json]

=========  =======================================================================================================
plain      every client asks for 64 tokens after a prompt of 256 that nobody else has
shared     80 % of a prompt of 512 tokens are the same for everybody
document   everybody asks 32 tokens about one document of 4,096
mixed      short streams (32 tokens in, 200 out) while one client reads prompts of 4,096 tokens
=========  =======================================================================================================

A server is a process of its own, started for each scenario anew, so that nothing is cached from the one before. Rates
are tokens of answers per second over the whole scenario; of TTFT and ITL the medians and 95th percentiles are shown.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx
import numpy as np
from rich.table import Table

from herdgraph.console import emit_json, run_cli, stderr
from herdgraph.errors import HerdError

from .load import Load, Question, load
from .screen import show_tables

ROOT = Path(__file__).parents[1]
QUESTIONS = {1: 4, 4: 3, 16: 2, 64: 1}
"""Questions of each client, by the number of clients: the more, the fewer."""
START_SECONDS = 300
SETTLE_SECONDS = 6
"""After a server's first answer: ours copies its weights into faster memory meanwhile."""


@dataclass(frozen=True)
class Contestant:
    """A server.

    Attributes:
        name: in the table.
        command: starts it; ``{port}`` and ``{clients}`` are replaced.
    """

    name: str
    command: tuple[str, ...]


def ours(bundle: Path, threads: int) -> Contestant:
    """This project's server."""
    command = (sys.executable, "-m", "herdgraph", "serve", str(bundle), "--port", "{port}", "--threads", str(threads))
    return Contestant("herdgraph", command)


def opponent(given: str, threads: int) -> Contestant:
    """llama.cpp's server: ``NAME=SERVER:GGUF``."""
    name, _, rest = given.partition("=")
    server, _, model = rest.rpartition(":")
    if not (Path(server).is_file() and Path(model).is_file()):
        raise HerdError(f"--opponent {given}: give NAME=SERVER:GGUF, the paths of llama-server and of a model")
    command = (server, "-m", model, "--port", "{port}", "-t", str(threads), "-tb", str(threads), "-np", "{clients}",
               "-c", "{context}", "--no-warmup")
    return Contestant(name, command)


def scenario(name: str, clients: int, vocabulary: int) -> list[list[Question]]:
    """The questions of each client."""
    random = np.random.default_rng(clients)

    def ids(count: int) -> list[int]:
        return random.integers(300, vocabulary - 300, count).tolist()

    each = QUESTIONS.get(clients, 1)
    if name == "plain":
        return [[Question(ids(256), 64) for _ in range(each)] for _ in range(clients)]
    if name == "shared":
        common = ids(410)
        return [[Question(common + ids(102), 64) for _ in range(each)] for _ in range(clients)]
    if name == "document":
        text = ids(4096)
        return [[Question(text + ids(32), 32)] for _ in range(clients)]
    streams = [[Question(ids(32), 200)] for _ in range(max(1, clients - 1))]
    return [*streams, [Question(ids(4096), 8, delay=3.0)]]


@contextmanager
def served(contestant: Contestant, clients: int, context: int) -> Iterator[str]:
    """A running server; its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [part.format(port=port, clients=clients, context=context) for part in contestant.command]
    with tempfile.TemporaryFile() as log, \
            subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=log) as process:
        try:
            _wait(process, log, url := f"http://127.0.0.1:{port}")
            yield url
        finally:
            process.terminate()
            process.wait(30)


def _wait(process: subprocess.Popen[bytes], log: IO[bytes], url: str) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        if process.poll() is not None:
            log.seek(0)
            raise HerdError(f"{process.args} ended at its start: {log.read().decode(errors='replace')[-500:]}")
        try:
            # One server is healthy before its model is there, another one lists it before.
            asked = [httpx.get(url + path, timeout=2).status_code for path in ("/health", "/v1/models")]
            if asked == [httpx.codes.OK] * 2:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise HerdError(f"{url} did not answer within {START_SECONDS} s")


def measure(contestant: Contestant, name: str, clients: int, vocabulary: int) -> Load:
    """One scenario on a fresh server, after a question that is not counted."""
    questions = scenario(name, clients, vocabulary)
    longest = max(len(one.prompt) + one.tokens for client in questions for one in client)
    with served(contestant, len(questions), (longest + 64) * len(questions)) as url:
        load(url, [[Question([400] * 40, 4)]])
        time.sleep(SETTLE_SECONDS)
        measured = load(url, questions)
    for failure in sorted(set(measured.failures)):
        stderr.print(f"{contestant.name}: {failure}")
    if len(measured.failures) == len(measured.seen):
        raise HerdError(f"{contestant.name} answered nothing: {measured.failures[0]}")
    return measured


def row(name: str, clients: int, contestant: str, measured: Load) -> dict[str, object]:
    """What is shown of a scenario."""
    return {"scenario": name, "clients": clients, "server": contestant, "tokens_per_s": measured.rate,
            "ttft_p50": measured.first(50), "ttft_p95": measured.first(95), "itl_p50": measured.gap(50),
            "itl_p95": measured.gap(95), "worst_stream": _worst_stream(measured),
            "cached": sum(one.cached for one in measured.seen), "failures": len(measured.failures)}


def _worst_stream(measured: Load) -> float:
    """The largest ratio of a stream's 95th percentile to its median between tokens."""
    streams = [np.array(one.gaps) for one in measured.seen if len(one.gaps) > 1]
    return max((float(np.percentile(gaps, 95) / np.median(gaps)) for gaps in streams), default=float("nan"))


def table(rows: Sequence[dict[str, object]]) -> Table:
    """Rows for people."""
    shown = Table("scenario", "clients", "server", *(title for title in (
        "tokens/s", "TTFT p50", "p95", "ITL p50", "p95", "worst p95/p50", "cached", "failed")))
    for one in rows:
        times = (f"{1000 * float(str(one[key])):,.0f} ms" for key in ("ttft_p50", "ttft_p95", "itl_p50", "itl_p95"))
        shown.add_row(str(one["scenario"]), str(one["clients"]), str(one["server"]),
                      f"{float(str(one['tokens_per_s'])):.1f}", *times, f"{float(str(one['worst_stream'])):.1f}",
                      str(one["cached"]), str(one["failures"]))
    return shown


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--opponent", action="append", default=[])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--scenarios", nargs="+", default=["plain", "shared", "mixed"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    contestants = [ours(options.bundle, options.threads),
                   *(opponent(given, options.threads) for given in options.opponent)]
    rows = []
    for name in options.scenarios:
        for clients in options.clients:
            for contestant in contestants * options.rounds:
                rows.append(row(name, clients, contestant.name, measure(contestant, name, clients, options.vocabulary)))
                stderr.print(f"{name}, {clients} clients, {contestant.name}: {rows[-1]['tokens_per_s']:.1f} tokens/s")
    emit_json(rows) if options.json else show_tables(table(rows))


if __name__ == "__main__":
    run_cli(main)
