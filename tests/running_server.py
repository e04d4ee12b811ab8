"""`ggtool serve` in a process of its own, and what tests ask of it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Server:
    """A server's process, where it listens, and what it has written to stderr."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def request(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Return status and JSON (text where it is none) of a GET, or of a POST of `body`."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, {"Content-Type": "application/json", **headers}
        )
        try:
            with urllib.request.urlopen(request, timeout=600) as response:
                status, text = response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read().decode()
        try:
            return status, json.loads(text)
        except ValueError:
            return status, text

    def busy(self, model: str) -> int:
        """Return how many slots of a model are in use."""
        return int(self.request("/health")[1]["loaded"].get(model, {"busy": 0})["busy"])

    def children(self) -> list[int]:
        """Return the process ids of the loaded models."""
        listed = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(child) for child in listed.split()]

    def child(self) -> int:
        """Return the process id of the only loaded model."""
        (child,) = self.children()
        return child


@contextmanager
def serving(folder: Path, arguments: Sequence[str]) -> Iterator[Server]:
    """Start a server on a free port and stop it as Ctrl-C does."""
    log = folder / f"server-{time.monotonic_ns()}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "ggtool", "serve", *arguments, "--port", "0"],
            stderr=out,
            stdout=out,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        try:
            yield Server(wait_for_address(process, log), process, log)
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_for_address(process: subprocess.Popen[bytes], log: Path) -> str:
    for _ in range(6000):
        if found := re.search(r"http://\S+(?=/ is the page)", log.read_text()):
            return found[0]
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise AssertionError(log.read_text())


def eventually(holds: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether something comes true soon."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if holds():
            return True
        time.sleep(0.05)
    return False
