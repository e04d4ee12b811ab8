"""GET /: the page to talk to the models, four files that need no network."""

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


FILES = {"/": "index.html", "/page.js": "page.js", "/page.css": "page.css", "/icon.svg": "icon.svg"}


async def answer(request: Request) -> Response:
    """Answer GET of one of FILES."""
    return FileResponse(_FOLDER / FILES[request.url.path], headers=_HEADERS)
