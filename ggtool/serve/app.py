"""The server's routes, and what stands before all of them: the API key, the origin, errors in one shape."""

from __future__ import annotations

import hmac
import sys
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ggtool.serve.api import chat, completions, messages, page, responses, status, tokens
from ggtool.serve.api.errors import error_response
from ggtool.serve.api.openapi import openapi
from ggtool.serve.engine.requests import RequestError
from ggtool.serve.pool import Pool
from ggtool.serve.settings import Settings

_OPEN_PATHS = (*page.FILES, "/health")  # the page asks its reader for the key
_CLIENT_GONE = 499  # nobody reads it; nginx's number for its log


def make_app(pool: Pool, settings: Settings) -> Starlette:
    """Return the application; its models are unloaded when it ends."""

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        yield
        await pool.close()

    routes = [
        *(Route(path, page.answer) for path in page.FILES),
        Route("/health", status.health),
        Route("/metrics", status.metrics),
        Route("/openapi.json", openapi),
        Route("/v1/models", status.list_models),
        Route("/v1/models/{name:path}", status.one_model),
        Route("/v1/chat/completions", chat.chat_completions, methods=["POST"]),
        Route("/v1/completions", completions.completions, methods=["POST"]),
        Route("/v1/embeddings", tokens.embeddings, methods=["POST"]),
        Route("/v1/responses", responses.responses, methods=["POST"]),
        Route("/v1/messages", messages.messages, methods=["POST"]),
        Route("/v1/messages/count_tokens", messages.count, methods=["POST"]),
        Route("/tokenize", tokens.tokenize, methods=["POST"]),
        Route("/detokenize", tokens.detokenize, methods=["POST"]),
    ]
    handlers = {
        RequestError: _request_error,
        HTTPException: _http_error,
        ClientDisconnect: _gone,
        Exception: _bug,
    }
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)  # type: ignore[arg-type]
    app.add_middleware(Gate, settings=settings)
    app.state.pool, app.state.settings = pool, settings
    app.state.registry = status.make_registry(pool)
    app.state.stopping = anyio.Event()
    return app


class Gate:
    """Refuses requests without the API key, and those that a page of another site made the browser send."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._key = app, settings.api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on or answer it with an error."""
        if scope["type"] == "http":
            try:
                self._check(Request(scope))
            except RequestError as error:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, request: Request) -> None:
        origin, host = request.headers.get("origin"), request.headers.get("host", "")
        if origin is not None and urlsplit(origin).netloc != host:
            raise RequestError(403, "requests from pages of other sites are not answered.")
        if self._key is None:
            if not _is_local(host):
                raise RequestError(
                    403,
                    "this server has no API key and answers to its IP address or localhost only; write one of them, or start it with "
                    "--api-key.",
                )
        elif request.url.path not in _OPEN_PATHS and not _has_key(request, self._key):
            raise RequestError(
                401, "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'."
            )


def _is_local(host: str) -> bool:
    """Whether a Host header is an address or localhost: a name that another site had point here is neither."""
    name = urlsplit(f"//{host}").hostname or ""
    return name == "localhost" or name.replace(".", "").isdigit() or ":" in name or name == ""


def _has_key(request: Request, key: str) -> bool:
    given = request.headers.get("authorization", "").partition(" ")[2] or request.headers.get("x-api-key", "")
    return hmac.compare_digest(given.encode(), key.encode())


async def _request_error(_request: Request, error: RequestError) -> Response:
    return error_response(error)


async def _http_error(request: Request, error: HTTPException) -> Response:
    if error.status_code == 404:
        return error_response(RequestError(404, f"there is nothing at {request.url.path[:200]}."))
    if error.status_code == 405:
        return error_response(RequestError(405, f"{request.method} is not for {request.url.path[:200]}."))
    return error_response(RequestError(error.status_code, str(error.detail)))


async def _gone(_request: Request, _error: ClientDisconnect) -> Response:
    return Response(status_code=_CLIENT_GONE)


async def _bug(_request: Request, error: Exception) -> Response:
    traceback.print_exception(error, file=sys.stderr)
    return error_response(RequestError(500, "the server made a mistake; its own output says which."))
