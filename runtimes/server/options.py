"""What an operator chooses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TextIO


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Names, limits and times of a server.

    Attributes:
        names: of the model in requests; the first one is answered.
        version: of herdgraph.
        context: most tokens of prompt and answer together, None for the model's own limit.
        api_keys: file of keys, None for an open server.
        image_hosts: hosts whose pictures and videos are fetched, such as ``images.example.com`` or ``*.example.com``.
        cors_origins: origins of web pages elsewhere that may ask.
        key_requests: requests at the same time with one key.
        request_log: takes one JSON line per request, None for none.
        otlp_traces_endpoint: URL that takes a span per request by OTLP over HTTP, None for no spans.
        tool_format: in which form the model writes tool calls: ``pythonic`` or ``json``; None for the one that its
            chat template asks for.
        body_bytes: most bytes of a request, beside 8 for each token of the context.
        body_seconds: in which it must have come.
        json_depth: of lists and objects in each other.
        json_lists: most lists and objects of a request.
        json_values: most values of a request, beside one for each token of the context.
        images: most pictures of a request.
        frames: most frames of all videos of a request.
        write_seconds: that a client may take to read what was sent, before it is cut off.
        keep_alive_seconds: of silence after which a stream says that it lives.
    """

    names: tuple[str, ...]
    version: str = "0"
    context: int | None = None
    api_keys: Path | None = None
    image_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    key_requests: int = 64
    request_log: TextIO | None = None
    otlp_traces_endpoint: str | None = None
    tool_format: str | None = None
    body_bytes: int = 64 << 20
    body_seconds: float = 30.0
    json_depth: int = 64
    json_lists: int = 100_000
    json_values: int = 2_000_000
    images: int = 8
    frames: int = 128
    write_seconds: float = 60.0
    keep_alive_seconds: float = 15.0
