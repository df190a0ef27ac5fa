"""What is remembered of one request while it runs: for its line in the log, and for the metrics."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Scope

from ..scheduler import Delta, Usage


@dataclass
class Record:
    """One request. No prompt and no answer, only numbers and names.

    Attributes:
        request_id: the client's own ``x-request-id``, or a new one.
        method: of HTTP.
        path: without the query.
        key: name of the API key.
        choices: answers that were asked for.
        most_tokens: length limit of each.
        temperature: at which its tokens are drawn; None where it was refused before that was known.
        top_p: share of the likeliest tokens that are drawn from; None likewise.
        usage: of every prompt of the request, as the service counts it.
        finished: how answers ended, and how many did.
        status: of HTTP.
        started: by ``time.perf_counter``.
        first_token: seconds until the first token; None when there was none.
        gaps: seconds between tokens of the same answer.
        longest: tokens of the longest answer.
    """

    request_id: str
    method: str
    path: str
    key: str = ""
    choices: int = 0
    most_tokens: int = 0
    temperature: float | None = None
    top_p: float | None = None
    usage: list[Usage] = field(default_factory=list)
    finished: Counter[str] = field(default_factory=Counter)
    status: int = 0
    started: float = field(default_factory=time.perf_counter)
    first_token: float | None = None
    gaps: list[float] = field(default_factory=list)
    longest: int = 0

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.perf_counter() - self.started

    def total(self, name: str) -> int:
        """A count of ``Usage`` over all prompts."""
        return sum(getattr(usage, name) for usage in self.usage)

    def to_json(self) -> dict[str, Any]:
        """Its line in the log."""
        line: dict[str, Any] = {
            "time": round(time.time(), 3), "request_id": self.request_id, "method": self.method, "path": self.path,
            "status": self.status, "seconds": round(self.seconds, 4)}
        if self.key:
            line["key"] = self.key
        if self.usage:
            line |= {name: self.total(name) for name in ("prompt_tokens", "cached_tokens", "completion_tokens")}
            line["finish"] = dict(self.finished)
        if self.first_token is not None:
            line["ttft"] = round(self.first_token, 4)
            line["tpot"] = round(sum(self.gaps) / len(self.gaps), 5) if self.gaps else None
        return line


class Clock:
    """Times the deltas of one prompt's answers."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._last: dict[int, float] = {}
        self._tokens: Counter[int] = Counter()

    def see(self, delta: Delta) -> None:
        """Note a delta that has just come."""
        record, now = self._record, time.perf_counter()
        self._tokens[delta.choice] += len(delta.token_ids)
        record.longest = max(record.longest, self._tokens[delta.choice])
        if delta.token_ids:
            if record.first_token is None:
                record.first_token = now - record.started
            if delta.choice in self._last:
                record.gaps += [(now - self._last[delta.choice]) / len(delta.token_ids)] * len(delta.token_ids)
            self._last[delta.choice] = now
        if delta.finish_reason:
            record.finished[delta.finish_reason] += 1


def record_of(scope: Scope) -> Record:
    """The record of the request that is being answered."""
    record: Record = scope["herdgraph.record"]
    return record
