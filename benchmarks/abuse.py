"""``herdgraph serve`` under abuse: what comes back, and what those beside notice of it.

    python -m benchmarks.abuse BUNDLE [--only NAME ...] [--soak-minutes 30] [--json]

Every abuse meets a fresh server with one thread. Three witnesses ask questions with known answers, first without and
then with the abuse. The last row is the soak: 64 clients whose every answer is compared with the one that the same
question had alone, while the memory of the server is looked at.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from pathlib import Path
from typing import Any

from rich.table import Table

from herdgraph.console import emit_json, run_cli, stderr

from .abused_server import Target, serving
from .abuses import ABUSES, Abuse
from .screen import show_tables
from .strangers import Body, Count
from .witnesses import Testimony, ask, client_of, questions, solo, watching

QUIET_SECONDS = 8
SETTLE_SECONDS = 90
SOAK_CLIENTS = 64
SOAK_QUESTIONS = 200
SAMPLE_SECONDS = 10.0
WARM_SECONDS = 60.0
"""In which the memory of the server still grows: the cache of prefixes fills, threads begin."""

Row = dict[str, Any]


def abused(bundle: Path, name: str, abuse: Abuse) -> Row:
    """One abuse, and what it did."""
    asked = questions(12)
    with serving(bundle, *abuse.options) as target:
        alone = asyncio.run(solo(target.url, asked))
        with watching(target.url, asked, alone) as before:
            time.sleep(QUIET_SECONDS)
        files, started = target.open_files(), time.monotonic()
        if abuse.ends:
            counted = asyncio.run(abuse.work(target, abuse.count))
            return _row(name, abuse.count, counted, before, Testimony(), target, started) | {"left": "ended"}
        with watching(target.url, asked, alone) as beside:
            counted = asyncio.run(abuse.work(target, abuse.count))
        row = _row(name, abuse.count, counted, before, beside, target, started)
        return row | {"left": _left(target), "files": target.open_files() - files,
                      "peak_mb": target.memory("VmHWM") >> 20}


def _row(
    name: str, count: int, counted: Count, before: Testimony, beside: Testimony, target: Target, started: float
) -> Row:
    log = target.log.read_text(encoding="utf-8", errors="replace")
    return {"abuse": name, "count": count, "came_back": dict(sorted(counted.items())),
            "seconds": time.monotonic() - started, "answers": beside.answers, "wrong": before.wrong + beside.wrong,
            "gap_without": before.gap(95), "gap_with": beside.gap(95), "worst_without": before.gap(100),
            "worst_with": beside.gap(100), "tracebacks": log.count("Traceback"), "log": log[-2000:]}


def _left(target: Target) -> str:
    """What the server still does when it has had some time to notice that nobody waits."""
    until = time.monotonic() + SETTLE_SECONDS
    while any(left := target.left()) and time.monotonic() < until:
        time.sleep(0.2)
    return " / ".join(f"{number:g}" for number in left)


# -- soak ------------------------------------------------------------------------------------------------------------


def soak(bundle: Path, minutes: float) -> Row:
    """Many clients for a long time."""
    asked = questions(SOAK_QUESTIONS)
    with serving(bundle) as target:
        alone = asyncio.run(solo(target.url, asked))
        before, started = Testimony(), time.monotonic()
        counted, memory = asyncio.run(_soaked(target, asked, alone, 60 * minutes))
        row = _row("soak", SOAK_CLIENTS, counted, before, before, target, started) | {"left": _left(target)}
    warm = [used for after, used in memory if after >= min(WARM_SECONDS, 30 * minutes)]
    return row | {"rss_mb": {"start": memory[0][1] / 2**20, "warm": warm[0] / 2**20, "last": warm[-1] / 2**20,
                             "most": max(warm) / 2**20, "growth": max(warm) / warm[0] - 1}}


async def _soaked(
    target: Target, asked: list[Body], alone: list[str], seconds: float
) -> tuple[Count, list[tuple[float, int]]]:
    """Ask until the time is over; what came, and the server's memory over time."""
    counted, memory, started = Count(), list[tuple[float, int]](), time.monotonic()

    async def chat(number: int) -> None:
        chosen = random.Random(number)
        async with client_of(target.url) as client:
            while time.monotonic() - started < seconds:
                place = chosen.randrange(len(asked))
                heard = await ask(client, asked[place])
                counted["lost" if not heard.whole else "right" if heard.text == alone[place] else "wrong"] += 1

    async def look() -> None:
        while True:
            memory.append((time.monotonic() - started, target.memory()))
            await asyncio.sleep(SAMPLE_SECONDS)

    looking = asyncio.ensure_future(look())
    await asyncio.gather(*(chat(number) for number in range(SOAK_CLIENTS)))
    looking.cancel()
    memory.append((time.monotonic() - started, target.memory()))
    return counted, memory


# -- what is shown ---------------------------------------------------------------------------------------------------


def table(rows: list[Row]) -> Table:
    """Rows for people."""
    shown = Table("abuse", "count", "came back", "witnesses", "wrong", "ITL p95 without / with", "worst",
                  "left: running / waiting / kv", "files", "peak MB")
    for row in rows:
        came = ", ".join(f"{what} x {number}" for what, number in row["came_back"].items())
        came += "".join(f"; RSS {what} {value:.3f}" for what, value in row.get("rss_mb", {}).items())
        shown.add_row(row["abuse"], str(row["count"]), came, str(row["answers"]), str(row["wrong"]),
                      f"{row['gap_without']:.1f} / {row['gap_with']:.1f} ms",
                      f"{row['worst_without']:.0f} / {row['worst_with']:.0f} ms", row["left"],
                      str(row.get("files", "")), str(row.get("peak_mb", "")))
    return shown


def main() -> None:
    """Parse, abuse, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--only", nargs="+", choices=[*ABUSES, "soak"], default=[*ABUSES, "soak"])
    parser.add_argument("--soak-minutes", type=float, default=30)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = []
    for name in options.only:
        found = name in ABUSES
        rows.append(abused(options.bundle, name, ABUSES[name]) if found else soak(options.bundle, options.soak_minutes))
        stderr.print(table(rows[-1:]))
        if rows[-1]["tracebacks"]:
            stderr.print(rows[-1]["log"])
    emit_json(rows) if options.json else show_tables(table(rows))


if __name__ == "__main__":
    run_cli(main)
