"""The node's side of a Ray cluster: run one work and stream what happens to the driver.

A work runs in a thread of Ray's worker process, and its events are yielded one by one: ("progress", stage, done, total),
("chunk", destination, name, bytes), ("whole", destination), and at the end ("result", value, started_s, ended_s) or
("failure", reason, started_s, ended_s).
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ggtool.errors import GgtoolError
from ggtool.system.cache import sources_sha256
from ggtool.system.schedule.manifest import CHUNK_BYTES, Make, Manifest, fetch
from ggtool.system.schedule.work import Work, call

Event = tuple[Any, ...]
_PROGRESS_EVERY_S = 0.5
# So many events may wait for the driver to take them; a chunk is one.
_MOST_WAITING = 4


@dataclass(frozen=True)
class Order:
    """A work for a node: manifests of its files by the driver's path, where to read them, the driver's code.

    server: an actor beside the driver with `read(path, offset, n_bytes)`; None on the driver's own machine, where the files
    are used as they lie.
    """

    work: Work
    manifests: Mapping[Path, Manifest]
    server: Any
    code_sha256: str


class FileServer:
    """An actor on the driver's machine that reads its files for the nodes."""

    def read(self, path: Path, offset: int, n_bytes: int) -> bytes:
        """Return bytes of a file."""
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(n_bytes)


class _Site:
    """The node that the work's function runs on, as it sees it."""

    def __init__(self, order: Order, events: queue.Queue[Event]) -> None:
        self._order = order
        self._events = events
        self._told_s = 0.0

    def progress(self, stage: str, done: int, total: int) -> None:
        if done >= total or time.monotonic() - self._told_s > _PROGRESS_EVERY_S:
            self._told_s = time.monotonic()
            self._events.put(("progress", stage, done, total))

    def place(self, path: Path, make: Make | None = None) -> Path:
        server = self._order.server
        if server is None:
            return path
        import ray

        def read(origin: Path, offset: int, n_bytes: int) -> bytes:
            block: bytes = ray.get(server.read.remote(origin, offset, n_bytes))
            return block

        return fetch(
            self._order.manifests[path],
            read,
            lambda done, total: self.progress("copying", done >> 20, total >> 20),
            make,
        )

    def deliver(self, made: Path, to: Path) -> None:
        if made != to or self._order.server is not None:
            for path in sorted(made.iterdir()) if made.is_dir() else [made]:
                self._send(path, to, path.name if made.is_dir() else "")
            self._events.put(("whole", to))

    def _send(self, path: Path, to: Path, name: str) -> None:
        with path.open("rb") as file:
            self._events.put(("chunk", to, name, b""))
            while chunk := file.read(CHUNK_BYTES):
                self._events.put(("chunk", to, name, chunk))


def run_order(order: Order) -> Iterator[Event]:
    """Do a work on this node and yield its events."""
    if sources_sha256("") != order.code_sha256:
        yield (
            "failure",
            "this node has another version of ggtool than the driver; install the same one.",
            0.0,
            0.0,
        )
        return
    if os.getpriority(os.PRIO_PROCESS, 0) > 0:
        with suppress(OSError):  # Ray's workers are nice by 15; only root may take that back
            os.setpriority(os.PRIO_PROCESS, 0, 0)
    events: queue.Queue[Event] = queue.Queue(_MOST_WAITING)
    thread = threading.Thread(target=_do, args=(order, events), daemon=True)
    started_s = time.time()
    thread.start()
    while True:
        event = events.get()
        if event[0] in ("result", "failure"):
            yield (*event, started_s, time.time())
            return
        yield event


def _do(order: Order, events: queue.Queue[Event]) -> None:
    try:
        events.put(("result", call(order.work, _Site(order, events))))
    except GgtoolError as error:
        events.put(("failure", str(error)))
    except Exception as error:  # noqa: BLE001  # an end that is not told would keep the driver waiting for ever
        events.put(("failure", f"{type(error).__name__}: {error}"))
