"""The application: OpenAI's API, and Anthropic's messages, on one service."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from ...errors import HerdError
from . import errors
from .disconnects import CancelOnDisconnect
from .errors import Recover
from .gate import Gate
from .limits import BodyLimits
from .options import ServerOptions
from .request_log import RequestLog
from .routes.chat import chat_routes
from .routes.completions import completion_routes
from .routes.health import health_routes
from .routes.messages import message_routes
from .routes.models import model_routes
from .routes.page import page_routes
from .routes.responses import response_routes
from .routes.tokenize import token_routes
from .routes.unsupported import unsupported_routes
from .serving import Backend, Serving
from .toolkit import Toolkit

if TYPE_CHECKING:
    from .tracing import Traces


def create_app(service: Backend | None, options: ServerOptions, toolkit: Toolkit | None = None) -> FastAPI:
    """An ASGI application; its ``state.serving`` opens it later where there is no service yet, and drains it.

    Args:
        service: what answers, None while the model loads.
        options: names, limits and times.
        toolkit: tools and grammars; for tests.

    Raises:
        HerdError: the file of API keys cannot be used, or spans are asked for without the extra that makes them.
    """
    serving = Serving(options, toolkit or Toolkit())
    app = FastAPI(title="herdgraph", version=options.version, docs_url=None, redoc_url=None,
                  middleware=_middleware(serving), redirect_slashes=False)
    app.state.serving = serving
    errors.install(app)
    app.include_router(page_routes())
    routers = (chat_routes, completion_routes, token_routes, response_routes, message_routes, model_routes,
               health_routes)
    for routes in routers:
        app.include_router(routes(serving))
    app.include_router(unsupported_routes())
    if service is not None:
        serving.open(service)
    return app


def _middleware(serving: Serving) -> list[Middleware]:
    """From the outside to the inside."""
    options = serving.options
    cors = [Middleware(CORSMiddleware, allow_origins=list(options.cors_origins), allow_methods=["GET", "POST"],
                       allow_headers=["*"], expose_headers=["x-request-id", "x-herdgraph-ignored", "retry-after"])]
    return [
        Middleware(RequestLog, metrics=serving.metrics, lines=options.request_log, traces=_traces(options)),
        *(cors if options.cors_origins else []),
        Middleware(Recover),
        Middleware(Gate, serving=serving),
        Middleware(BodyLimits, serving=serving),
        Middleware(CancelOnDisconnect),
    ]


def _traces(options: ServerOptions) -> Traces | None:
    if options.otlp_traces_endpoint is None:
        return None
    try:
        tracing = importlib.import_module(".tracing", __package__)
    except ModuleNotFoundError as error:
        raise HerdError(f"traces need the package {error.name}: pip install 'herdgraph[otel]'") from error
    traces: Traces = tracing.Traces.to(options.otlp_traces_endpoint, options.names[0])
    return traces
