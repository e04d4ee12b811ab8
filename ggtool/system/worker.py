"""Run one task in a child process, so that a crash of native code is an error message and not the end of ggtool.

The parent writes the pickled job on the child's stdin; `ggtool.system.child` has the pipes between the two. Inside `forking`, jobs that
allow it are forked from a process that has imported their libraries, and compute the same numbers some seconds earlier.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import pickle
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from ggtool.errors import GgtoolError, MeasureError
from ggtool.system.child import QUIET_ABORT, Child
from ggtool.system.fork_server import ForkServer
from ggtool.system.progress import Progress

_MODULE = "ggtool.system.worker"


class Job(Protocol):
    """A task for a child process: a picklable dataclass of plain values.

    runs: "module:function" that the child calls with the job and a Progress, and that returns an Outcome.
    task: its name in error messages.
    """

    runs: ClassVar[str]
    task: ClassVar[str]

    @property
    def threads(self) -> int:
        """The number of threads for the child's libraries."""
        ...


@runtime_checkable
class ForkableJob(Job, Protocol):
    """A job whose numbers are the same in a process that is forked from one with its libraries imported."""

    @property
    def imports(self) -> str | None:
        """The module to have imported; None where the child would not import it, or must be a process of its own after all."""
        ...


@dataclass(frozen=True)
class Outcome:
    """The result of a task: parts of a record by name, the model's footprint, library versions."""

    numbers: dict[str, Any]
    footprint: dict[str, Any]
    versions: dict[str, str]


def run(job: Job, progress: Progress = lambda done, total: None, timeout_s: float | None = None) -> Outcome:
    """Do `job` in a child; MeasureError says how the child ended when it did not answer."""
    server = _server_for(job)
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    with _start(job, server) as child:
        child.write(pickle.dumps(job))
        while True:
            try:
                event = child.receive(None if deadline is None else deadline - time.monotonic())
            except TimeoutError:
                raise MeasureError(f"{job.task}: no answer within {timeout_s:g} s, stopped.") from None
            if event is None:
                raise MeasureError(f"{job.task}: {child.cause_of_death()}")
            if "error" in event:
                raise MeasureError(event["error"])
            if "outcome" in event:
                return Outcome(**event["outcome"])
            progress(event["done"], event["total"])


@contextmanager
def forking() -> Iterator[None]:
    """Fork jobs that allow it meanwhile, from a server that starts with the first of them and ends with this block.

    It shares its libraries' memory with every process that has them: what measures a process's memory must come before.
    """
    with ExitStack() as servers:
        token = _forking.set(_Servers(servers))
        try:
            yield
        finally:
            _forking.reset(token)


class _Servers:
    """The servers of a `forking` block, by what their children need."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._running: dict[tuple[str, int], ForkServer] = {}

    def ready(self, imports: str, threads: int) -> ForkServer | None:
        """Return a server, started when it is first asked for; None where it cannot fork safely."""
        key = imports, threads
        if key not in self._running:
            server = ForkServer(imports, {**QUIET_ABORT, **_environment(threads)})
            self._running[key] = self._stack.enter_context(server)
        server = self._running[key]
        return server if server.is_ready else None


_forking: ContextVar[_Servers | None] = ContextVar("_forking", default=None)


def _server_for(job: Job) -> ForkServer | None:
    servers = _forking.get()
    if servers is None or not isinstance(job, ForkableJob) or job.imports is None:
        return None
    return servers.ready(job.imports, job.threads)


def _start(job: Job, server: ForkServer | None) -> Child:
    if server is not None:
        with suppress(ConnectionError):  # the server was killed, which must not be the job's end
            return Child(_MODULE, server=server)
    return Child(_MODULE, _environment(job.threads))


def _environment(threads: int) -> dict[str, str]:
    # Everything a child loads is on this disk; no library may ask a hub.
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    # bitsandbytes' CPU code takes its thread count from OpenMP alone.
    return {**offline, "OMP_NUM_THREADS": str(threads)}


def main() -> None:
    """Run the child's side: read a job from stdin, write events to the descriptor named in argv."""
    job: Job = pickle.load(sys.stdin.buffer)  # noqa: S301  # from our own parent
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    with os.fdopen(int(sys.argv[1]), "w", encoding="utf-8", buffering=1) as events:

        def send(**event: Any) -> None:
            events.write(json.dumps(event, allow_nan=False) + "\n")

        try:
            module, _, function = job.runs.partition(":")
            do = getattr(importlib.import_module(module), function)
            outcome = do(job, lambda done, total: send(done=done, total=total))
        except GgtoolError as error:
            send(error=f"{job.task}: {error}")
        else:
            send(outcome=dataclasses.asdict(outcome))


def _exit_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 1024):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
