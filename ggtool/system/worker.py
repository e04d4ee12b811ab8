"""Run one task in a child process, so that a crash of native code is an error message and not the end of ggtool.

The parent writes the pickled job on the child's stdin and keeps that pipe open; the child exits when it closes, so a
parent that was killed leaves nothing running. Events come back as JSON lines on a pipe of their own, because
libraries print to stdout and stderr as they please; both go to a log whose last lines explain a crash.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO, Any, ClassVar, Protocol

from ggtool.errors import GgtoolError, MeasureError
from ggtool.system.progress import Progress

_LOG_TAIL_CHARS = 300


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


@dataclass(frozen=True)
class Outcome:
    """The result of a task: parts of a record by name, the model's footprint, library versions."""

    numbers: dict[str, Any]
    footprint: dict[str, Any]
    versions: dict[str, str]


def run(job: Job, progress: Progress = lambda done, total: None, timeout_s: float | None = None) -> Outcome:
    """Do `job` in a child; MeasureError says how the child ended when it did not answer."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    with tempfile.TemporaryFile() as log, _child(job.threads, log) as (child, events):
        assert child.stdin is not None
        try:
            pickle.dump(job, child.stdin)
            child.stdin.flush()
            outcome = _follow(events, progress, deadline)
        except BrokenPipeError:  # it died before it could read the job
            outcome = None
        except TimeoutError:
            raise MeasureError(f"{job.task}: no answer within {timeout_s:g} s, stopped.") from None
        if outcome is None:
            raise MeasureError(f"{job.task}: {_cause(child.wait(), log)}")
        return outcome


@contextmanager
def _child(threads: int, log: IO[bytes]) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """Start a child, yield it with the pipe of its events, and end it after the block."""
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb", buffering=0) as events:
        try:
            child = subprocess.Popen(
                [sys.executable, "-m", "ggtool.system.worker", str(writer)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=[writer],
                env=_environment(threads),
            )
        finally:
            os.close(writer)
        try:
            yield child, events
        finally:
            child.kill()
            child.wait()
            assert child.stdin is not None
            with suppress(BrokenPipeError):
                child.stdin.close()


def _follow(events: IO[bytes], progress: Progress, deadline: float | None) -> Outcome | None:
    """Relay progress until the outcome comes; None when the child ended without one."""
    pending = b""
    while True:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not select.select([events], [], [], left)[0]:
            raise TimeoutError
        block = os.read(events.fileno(), 65536)
        if not block:
            return None
        *lines, pending = (pending + block).split(b"\n")
        for event in map(json.loads, lines):
            if "done" in event:
                progress(event["done"], event["total"])
            elif "error" in event:
                raise MeasureError(event["error"])
            else:
                return Outcome(**event["outcome"])


def _environment(threads: int) -> dict[str, str]:
    # Everything a child loads is on this disk; no library may ask a hub.
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    # bitsandbytes' CPU code takes its thread count from OpenMP alone.
    return {**os.environ, **offline, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}


def _cause(status: int, log: IO[bytes]) -> str:
    log.seek(0)
    lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    said = f" It said last: {lines[-1][-_LOG_TAIL_CHARS:]}" if lines else ""
    if status >= 0:
        return f"the process ended with exit code {status}.{said}"
    name = signal.Signals(-status).name
    hint = " (out of memory, most likely)" if name == "SIGKILL" else ""
    return f"the process was ended by {name}{hint}.{said}"


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
