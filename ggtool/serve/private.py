"""A server for one program of this machine alone: a child with one model, on loopback, behind a key that nobody else has."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ggtool.chat.remote import Server
from ggtool.errors import CrashError
from ggtool.system.child import Child, raise_error

CHILD = "ggtool.serve.private_child"


@contextmanager
def private_server(path: Path, *, n_ctx: int, threads: int, device: str) -> Iterator[Server]:
    """Serve the model at `path` until the end of the block; the server is gone with this process, however it ends.

    Raises what `ggtool serve` raises for a model that it cannot serve.
    """
    key = secrets.token_urlsafe(32)
    with Child(CHILD, {"GGTOOL_API_KEY": key}) as child:
        child.send({"model": str(path), "n_ctx": n_ctx, "threads": threads, "device": device})
        event = child.receive()
        if event is None:
            raise CrashError(f"the server for {path.name} did not start: {child.cause_of_death()}")
        raise_error(event)
        yield Server(event["url"], key, event["name"])
