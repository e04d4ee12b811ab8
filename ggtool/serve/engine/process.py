"""The server's side of a model's process: start it, send requests, hand its events to whoever waits, notice its end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncGenerator, Callable
from dataclasses import asdict
from typing import IO, Any

import psutil

from ggtool.serve.engine.requests import LENGTH, MAX_MESSAGE_BYTES, Generate, ModelJob, RequestError

Event = list[Any]
_LOG_TAIL_CHARS = 300
_STOP_S = 5.0
_OWN_ID = 0  # of errors that belong to no request: the model could not be loaded


class ModelProcess:
    """One model in a child process; everything here runs in one event loop.

    Attributes:
        facts: what the child said of the model once it was loaded.
        busy, waiting: slots in use and requests in its queue, as it last said.
        n_pending: requests handed over and not over.

    """

    def __init__(self, job: ModelJob) -> None:
        self.job = job
        self.facts: dict[str, Any] = {}
        self.busy = self.waiting = 0
        self._next = 0
        self._queues: dict[int, asyncio.Queue[Event]] = {}
        self._child: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._transport: asyncio.Transport | None = None
        self._loaded: asyncio.Future[dict[str, Any]] | None = None
        self._reporting: asyncio.Task[None] | None = None
        self._is_stopping = False

    @property
    def n_pending(self) -> int:
        """How many requests are with the model, in slots or waiting."""
        return len(self._queues)

    @property
    def is_alive(self) -> bool:
        """Whether the child is there and listens."""
        return self._child is not None and self._child.poll() is None and self._transport is not None

    def memory_bytes(self) -> int:
        """Return the child's resident memory, mapped weights included; 0 when it is gone."""
        if self._child is None:
            return 0
        try:
            return int(psutil.Process(self._child.pid).memory_info().rss)
        except psutil.Error:
            return 0

    async def start(self) -> None:
        """Start the child and wait until the model is loaded; RequestError 500 with the reason if it cannot be."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._log = tempfile.TemporaryFile()  # noqa: SIM115 - it is read when the child has ended
            self._child = subprocess.Popen(
                [sys.executable, "-m", "ggtool.serve.engine.child", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=[theirs.fileno()],
                env=_environment(self.job.threads),
            )
        ours.setblocking(False)
        loop = asyncio.get_running_loop()
        self._loaded = loop.create_future()
        wire = _Wire(self._take, self._lost)
        self._transport, _ = await loop.create_unix_connection(lambda: wire, sock=ours)
        self._write(asdict(self.job))
        try:
            self.facts = await self._loaded
        except ConnectionError:
            reason = await self._cause()
            await self.stop()
            raise RequestError(500, f"the model's process ended while it loaded: {reason}") from None
        except BaseException:
            await self.stop()
            raise

    async def generate(self, request: Generate) -> AsyncGenerator[Event, None]:
        """Yield the events of a generation; leaving early cancels it. RequestError as the child says."""
        queue: asyncio.Queue[Event] = asyncio.Queue()
        number = request.id
        self._queues[number] = queue
        ended = False
        try:
            self._write(request.to_json())
            while not ended:
                event = await queue.get()
                if event[0] == "error":
                    ended = True
                    raise RequestError(event[2], event[3], event[4])
                ended = event[0] == "end"
                yield event
        finally:
            self._queues.pop(number, None)
            if not ended:
                self._write({"op": "cancel", "id": number})

    async def call(self, op: str, **fields: Any) -> Any:
        """Return the reply to what is no generation."""
        queue: asyncio.Queue[Event] = asyncio.Queue()
        number = self.next_id()
        self._queues[number] = queue
        replied = False
        try:
            self._write({"op": op, "id": number, **fields})
            event = await queue.get()
            replied = True
            if event[0] == "error":
                raise RequestError(event[2], event[3], event[4])
            return event[2]
        finally:
            self._queues.pop(number, None)
            if not replied:
                self._write({"op": "cancel", "id": number})

    def next_id(self) -> int:
        """Return a number for a request, never _OWN_ID."""
        self._next += 1
        return self._next

    async def stop(self) -> None:
        """End the child: by asking, and after a while by force."""
        self._is_stopping = True
        if self.is_alive:
            self._write({"op": "stop"})
        if self._child is not None:
            try:
                await asyncio.to_thread(self._child.wait, _STOP_S if self.facts else 0.1)
            except subprocess.TimeoutExpired:
                self._child.kill()
                await asyncio.to_thread(self._child.wait)
        if self._reporting is not None:
            await self._reporting
        if self._transport is not None:
            self._transport.close()
            self._transport = None
        if self._log is not None:
            self._log.close()
            self._log = None
        self._end_all(RequestError(503, "the model was unloaded."))

    def _write(self, message: dict[str, Any]) -> None:
        if self._transport is not None and not self._transport.is_closing():
            data = json.dumps(message).encode()
            self._transport.write(LENGTH.pack(len(data)) + data)

    def _take(self, events: list[Event]) -> None:
        """Hand events to those who wait for them."""
        for event in events:
            if event[0] == "status":
                self.busy, self.waiting = event[1]["busy"], event[1]["waiting"]
            elif event[0] == "load":
                self._finish_loading(event[1])
            elif event[1] == _OWN_ID:
                self._finish_loading(RequestError(500, str(event[3])))
            elif (queue := self._queues.get(event[1])) is not None:
                queue.put_nowait(event)

    def _finish_loading(self, outcome: dict[str, Any] | RequestError) -> None:
        assert self._loaded is not None
        if self._loaded.done():  # cancelled
            return
        if isinstance(outcome, RequestError):
            self._loaded.set_exception(outcome)
        else:
            self._loaded.set_result(outcome)

    def _lost(self) -> None:
        """End everything that is under way, as the child is gone."""
        self._transport = None
        self.busy = self.waiting = 0
        if self._is_stopping:
            return
        assert self._loaded is not None
        if not self._loaded.done():
            self._loaded.set_exception(ConnectionError())
            return
        error = "the model's process has ended unexpectedly; it is started again for the next request."
        self._end_all(RequestError(500, error))
        self._reporting = asyncio.create_task(self._report_end())

    async def _report_end(self) -> None:
        sys.stderr.write(f"a model's process ended: {await self._cause()}\n")

    async def _cause(self) -> str:
        """Return how the child ended and what it said last."""
        assert self._child is not None
        assert self._log is not None
        try:
            status = await asyncio.to_thread(self._child.wait, _STOP_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            status = await asyncio.to_thread(self._child.wait)
        self._log.seek(0)
        lines = [
            line.strip() for line in self._log.read().decode(errors="replace").splitlines() if line.strip()
        ]
        said = f" It said last: {lines[-1][-_LOG_TAIL_CHARS:]}" if lines else ""
        if status >= 0:
            return f"exit code {status}.{said}"
        return f"{signal.Signals(-status).name}.{said}"

    def _end_all(self, error: RequestError) -> None:
        for number, queue in self._queues.items():
            queue.put_nowait(["error", number, error.status, error.message, error.param])


class _Wire(asyncio.Protocol):
    """Messages from the child as they come; a protocol and not a stream, which takes a turn of the loop more for each."""

    def __init__(self, take: Callable[[list[Event]], None], lost: Callable[[], None]) -> None:
        self._on_events, self._on_loss = take, lost
        self._buffer = bytearray()
        self._transport: asyncio.BaseTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while len(self._buffer) >= LENGTH.size:
            end = LENGTH.size + LENGTH.unpack_from(self._buffer)[0]
            if end > MAX_MESSAGE_BYTES:
                self._give_up()
                return
            if len(self._buffer) < end:
                return
            try:
                events = json.loads(self._buffer[LENGTH.size : end])
            except ValueError:
                self._give_up()
                return
            del self._buffer[:end]
            self._on_events(events)

    def connection_lost(self, _error: Exception | None) -> None:
        self._on_loss()

    def _give_up(self) -> None:
        assert self._transport is not None
        self._buffer.clear()
        self._transport.close()


def _environment(threads: int) -> dict[str, str]:
    # Everything a child loads is on this disk already; a library that would rather ask a hub must not.
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **offline, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
