"""GET /: the page to talk to the models, three files that need no network."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response

_FOLDER = Path(__file__).parent.parent / "page"
# Nothing from elsewhere, nothing in frames: what a model writes is text and never a part of the page.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


async def index(_request: Request) -> Response:
    """Answer GET /."""
    return FileResponse(_FOLDER / "index.html", headers=_HEADERS)


async def script(_request: Request) -> Response:
    """Answer GET /page.js."""
    return FileResponse(_FOLDER / "page.js", headers=_HEADERS)


async def style(_request: Request) -> Response:
    """Answer GET /page.css."""
    return FileResponse(_FOLDER / "page.css", headers=_HEADERS)


async def icon(_request: Request) -> Response:
    """Answer GET /icon.svg."""
    return FileResponse(_FOLDER / "icon.svg", headers=_HEADERS)
