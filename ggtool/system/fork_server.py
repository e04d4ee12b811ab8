"""A process that has imported a large library, and forks a child for each job that would import it anew.

multiprocessing's forkserver gives its children neither streams nor an environment of their own, imports `__main__` again, and
tells a child nothing of its parent's end; so this one is ours, and speaks to `ggtool.system.child` alone.

The server never computes: threads and OpenMP regions do not live on in a forked child. A library's pool that is there after the
imports (OpenBLAS) is taken down by its own fork handler; a server that has another thread says so, and nothing is forked.
Each child has a socket to the parent. On it come its number and, at its end, its exit status; when the parent closes it, or
dies, the server kills the child. The server itself ends when the parent does.
"""

from __future__ import annotations

import gc
import importlib
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from ggtool.system.imports import import_large
from ggtool.system.interrupts import shielded

# A child's number, and its status as subprocess has it: the exit code, or the signal's number below zero.
_NUMBER = struct.Struct("=q")
_THREADS = Path("/proc/self/task")
_READY = b"r"


class ForkServer:
    """A running server; close it, or use it in a `with` block, and neither it nor a child of it is left."""

    def __init__(self, imports: str, environment: Mapping[str, str]) -> None:
        """Start a server that has imported the module `imports`, with `environment` on top of this process's own."""
        self.environment = dict(environment)
        self._control, theirs = socket.socketpair()
        self._is_ready: bool | None = None
        try:
            with theirs, shielded():  # as a child is: Ctrl-C is the parent's to handle
                self._process = subprocess.Popen(
                    [sys.executable, "-m", __name__, str(theirs.fileno()), imports],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    env={**os.environ, **environment},
                )
        except BaseException:
            self._control.close()
            raise

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_ready(self) -> bool:
        """Whether it can fork, once the library is imported; it cannot where another thread is left, or where it died."""
        if self._is_ready is None:
            self._is_ready = self._control.recv(1) == _READY
        return self._is_ready

    def fork(self, module: str, events: int, stdin: int, log: int) -> ForkedProcess:
        """Fork a child that runs `main` of `module` as `python -m module EVENTS` does, with these descriptors.

        Raises ConnectionError where the server is gone.
        """
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                socket.send_fds(self._control, [module.encode()], [theirs.fileno(), events, stdin, log])
            return ForkedProcess(ours)
        except BaseException:
            ours.close()
            raise

    def close(self) -> None:
        """End the server and its children."""
        self._control.close()
        self._process.wait()


class ForkedProcess:
    """A child of the server, in the words of subprocess.Popen."""

    def __init__(self, ours: socket.socket) -> None:
        self._socket = ours
        self.pid = self._number()
        self._status: int | None = None

    def wait(self) -> int:
        """Wait for its end and return its exit code, or the signal's number below zero."""
        if self._status is None:
            try:
                self._status = self._number()
            except (
                ConnectionError
            ):  # the server is dead, and cannot say how a child ends that may still be running
                with suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGKILL)
                self._status = -signal.SIGKILL
            self._socket.close()
        return self._status

    def kill(self) -> None:
        """Kill it, unless it has ended."""
        if self._status is None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)

    def _number(self) -> int:
        received = self._socket.recv(_NUMBER.size, socket.MSG_WAITALL)
        if len(received) < _NUMBER.size:
            raise ConnectionResetError
        return int(_NUMBER.unpack(received)[0])


class _Server:
    """The server's side: one loop over the parent's requests, the children's sockets and SIGCHLD."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._sockets: dict[int, socket.socket] = {}  # of the children that run
        self._woken, waker = os.pipe()
        for end in (self._woken, waker):
            os.set_blocking(end, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)

    def serve(self) -> None:
        """Fork children until the parent closes its end."""
        try:
            while True:
                watched: list[socket.socket | int] = [self._control, self._woken, *self._sockets.values()]
                readable, *_ = select.select(watched, [], [])
                if self._woken in readable:
                    with suppress(BlockingIOError):
                        os.read(self._woken, 1 << 12)
                    self._reap()
                for number, child in list(self._sockets.items()):
                    if child in readable:  # nothing is ever sent on it: the parent has closed its end
                        os.kill(number, signal.SIGKILL)
                        self._reap(number)
                if self._control in readable and not self._fork():
                    return
        finally:
            for number in self._sockets:
                os.kill(number, signal.SIGKILL)

    def _reap(self, number: int = 0) -> None:
        """Tell of the children that have ended; wait for child `number`."""
        while self._sockets:
            found, status = os.waitpid(number or -1, 0 if number else os.WNOHANG)
            if not found:
                return
            with self._sockets.pop(found) as child, suppress(OSError):
                child.sendall(_NUMBER.pack(os.waitstatus_to_exitcode(status)))
            if number:
                return

    def _fork(self) -> bool:
        module, descriptors, *_ = socket.recv_fds(self._control, 1 << 12, 4)
        if not module:
            return False
        told, events, stdin, log = descriptors
        number = os.fork()
        if not number:
            for mine in (self._control, *self._sockets.values()):
                mine.close()
            os.close(told)
            _become(module.decode(), events, stdin, log)
        for descriptor in (events, stdin, log):
            os.close(descriptor)
        self._sockets[number] = socket.socket(fileno=told)
        with suppress(OSError):
            self._sockets[number].sendall(_NUMBER.pack(number))
        return True


def _become(module: str, events: int, stdin: int, log: int) -> NoReturn:
    """Be the child: run a module's `main` and end, with what an interpreter says of an error on stderr."""
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for descriptor, place in ((stdin, 0), (log, 1), (log, 2)):
            os.dup2(descriptor, place)
        os.close(stdin)
        os.close(log)
        sys.argv = [module, str(events)]
        importlib.import_module(module).main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001  # the interpreter's own last resort, which a forked child does not reach
        traceback.print_exc()
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _is_alone() -> bool:
    """Whether this process has one thread, after libraries have taken down their pools as they do at a fork."""
    number = os.fork()
    if not number:
        os._exit(0)
    os.waitpid(number, 0)
    return _THREADS.is_dir() and len(list(_THREADS.iterdir())) == 1


def main() -> None:
    """Run the server: import the module that argv names, then fork a child for each request."""
    control = socket.socket(fileno=int(sys.argv[1]))
    import_large(sys.argv[2])
    gc.collect()
    gc.freeze()  # so that no child's collector looks through what the libraries hold
    if not _is_alone():
        return
    server = _Server(control)
    control.sendall(_READY)
    server.serve()


if __name__ == "__main__":
    main()
