"""A child process that answers in JSON lines, for native code that may crash: its death is a reason, never a signal.

Requests go to the child's stdin, one line each; events come back on a pipe of their own, because libraries print to
stdout and stderr as they please. Both of those go to a log whose last lines explain a crash. The child ends when its
stdin closes, so a parent that was killed leaves nothing running, and Ctrl-C reaches the parent alone.
"""

from __future__ import annotations

import json
import os
import queue
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from ggtool import errors
from ggtool.errors import GgtoolError
from ggtool.system.fork_server import ForkedProcess, ForkServer
from ggtool.system.interrupts import shielded

Message = dict[str, Any]

_TAIL_CHARS = 300
_LOG_TAIL_BYTES = 1 << 16


class Child:
    """A running module; close it, or use it in a `with` block, and nothing of it is left behind."""

    def __init__(
        self, module: str, environment: Mapping[str, str] | None = None, server: ForkServer | None = None
    ) -> None:
        """Start `python -m module` with `environment` on top of this process's own.

        server: what forks the child instead, in the environment that it was started with; ConnectionError where it is gone.
        """
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - close() closes it
        self._pending = b""
        reader, writer = os.pipe()
        stdin, requests = os.pipe()
        self._events = os.fdopen(reader, "rb", buffering=0)
        self._requests = os.fdopen(requests, "wb")
        self._process: subprocess.Popen[bytes] | ForkedProcess
        try:
            # A shield while it starts: the child inherits the mask, and Ctrl-C is the parent's to handle.
            with shielded():
                if server is not None:
                    self._process = server.fork(module, writer, stdin, self._log.fileno())
                else:
                    self._process = subprocess.Popen(
                        [sys.executable, "-m", module, str(writer)],
                        stdin=stdin,
                        stdout=self._log,
                        stderr=self._log,
                        pass_fds=[writer],
                        env={**os.environ, **QUIET_ABORT, **(environment or {})},
                    )
        except BaseException:
            self._requests.close()
            self._events.close()
            self._log.close()
            raise
        finally:
            os.close(writer)
            os.close(stdin)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, message: Mapping[str, Any]) -> None:
        """Send one request, as a line of JSON."""
        self.write(json.dumps(message).encode() + b"\n")

    def write(self, request: bytes) -> None:
        """Send one request as it is; a child that is dead is noticed by `receive`."""
        with suppress(BrokenPipeError), shielded():  # half a request would be the end of the conversation
            self._requests.write(request)
            self._requests.flush()

    def receive(self, timeout_s: float | None = None) -> Message | None:
        """Return the next event, None when the child has ended; TimeoutError after `timeout_s`."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while (end := self._pending.find(b"\n")) < 0:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._events], [], [], left)[0]:
                raise TimeoutError
            with shielded():  # what was read must not get lost on the way to where it is kept
                block = os.read(self._events.fileno(), 1 << 16)
                self._pending += block
            if not block:
                return None
        with shielded():
            line, self._pending = self._pending[:end], self._pending[end + 1 :]
        event: Message = json.loads(line)
        return event

    def cause_of_death(self) -> str:
        """Wait for the end of a child that gave no answer; return how it ended and what it said last, in sentences."""
        ended, said = self.ending(), self._last_words()
        told = f" It said last: {said}" if said else ""
        hint = " (out of memory, most likely)" if ended == "SIGKILL" else ""
        how = f"was ended by {ended}{hint}" if isinstance(ended, str) else f"ended with exit code {ended}"
        return f"the process {how}.{told}"

    def ending(self) -> str | int:
        """Wait for its end; return the name of the signal that ended it, or its exit code."""
        status = self._process.wait()
        return signal.Signals(-status).name if status < 0 else status

    def _last_words(self) -> str:
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - _LOG_TAIL_BYTES))
        lines = [line.strip() for line in self._log.read().decode(errors="replace").splitlines()]
        return next((line[-_TAIL_CHARS:] for line in reversed(lines) if line.strip(" .")), "")

    def close(self) -> None:
        """End it now, whatever it is doing; closing twice is allowed."""
        self._process.kill()
        self._process.wait()
        with suppress(BrokenPipeError):
            self._requests.close()
        self._events.close()
        self._log.close()


class Parent:
    """The child's end of it. Requests are read by a thread, which ends the process when the parent is gone."""

    def __init__(self) -> None:
        """Open the pipe that the command line names."""
        self._events = os.fdopen(int(sys.argv[1]), "wb")
        self._requests: queue.SimpleQueue[Message] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def receive(self) -> Message:
        """Wait for the next request and return it."""
        return self._requests.get()

    def has_spoken(self) -> bool:
        """Tell whether a request is waiting."""
        return not self._requests.empty()

    def send(self, **event: Any) -> None:
        """Send one event; numbers are finite."""
        self._events.write(json.dumps(event, allow_nan=False).encode() + b"\n")
        self._events.flush()

    def _read(self) -> None:
        for line in sys.stdin.buffer:
            self._requests.put(json.loads(line))
        os._exit(1)


# ggml prints a backtrace when it aborts, through a debugger where there is one: seconds, and not the reason.
QUIET_ABORT = {"GGML_NO_BACKTRACE": "1", "PYTHONUNBUFFERED": "1"}


def as_event(error: GgtoolError) -> Message:
    """Return what `raise_error` on the other side raises again, by its nearest name in `ggtool.errors`."""
    kind = next(kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
    return {"error": [kind.__name__, str(error)]}


def raise_error(event: Message) -> None:
    """Raise the error in an event; return if there is none."""
    if "error" in event:
        name, message = event["error"]
        raise getattr(errors, name)(message)
