"""Run the server: an address to listen on, uvicorn, and an orderly end that lets streams finish."""

from __future__ import annotations

import signal
import socket

import uvicorn

from ggtool.errors import UsageError
from ggtool.serve.app import make_app
from ggtool.serve.pool import Pool
from ggtool.serve.settings import Settings

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def check_address(settings: Settings, *, knows: bool) -> None:
    """Raise UsageError for an address that others can reach, without a key and without --i-know."""
    if settings.host not in _LOOPBACK and settings.api_key is None and not knows:
        raise UsageError(
            f"--host {settings.host} lets other machines in; pass --api-key KEY, or --i-know to serve everyone."
        )


def bind(settings: Settings) -> socket.socket:
    """Return a listening socket; UsageError when the address cannot be had."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
        listener.listen(256)
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot listen on {settings.host} port {settings.port}: {reason}.") from None
    return listener


def serve(pool: Pool, settings: Settings, listener: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM; a second one ends it at once."""
    config = uvicorn.Config(
        make_app(pool, settings),
        log_config=None,
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=int(settings.drain_s) + 1,
        http="httptools",  # a streamed token is a chunk, and h11 takes three times as long for one
    )
    # uvicorn raises the signal that ended it once more, behind its own handlers; an orderly end is no failure.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda _number, _frame: None)
    uvicorn.Server(config).run(sockets=[listener])
