"""A running server: the bundled model as a GGUF file and in float, with a plain chat template."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ggtool.conversion.convert import convert
from ggtool.formats import find_qtype
from ggtool.source.resolve import bundled

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@dataclass
class Server:
    """A server's process, where it listens, and what it has written to stderr."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def request(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Return status and JSON (text where it is none) of a GET, or of a POST of `body`."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json", **headers})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
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

    def child(self) -> int:
        """Return the process id of the only loaded model."""
        (child,) = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(child)


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
    for _ in range(600):
        if found := re.search(r"http://\S+(?=/ is the page)", log.read_text()):
            return found[0]
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise AssertionError(log.read_text())


@pytest.fixture(scope="session")
def demo_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model in Q8_0."""
    path = tmp_path_factory.mktemp("serve") / "demo.gguf"
    convert(bundled(), [find_qtype("q8_0")], lambda _: path)
    return path


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "plain.jinja"
    path.write_text(TEMPLATE)
    return path


@pytest.fixture(scope="session")
def server(demo_gguf: Path, template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests that do not stop it: "demo" is a GGUF file, "fp32" runs in torch."""
    models = [f"demo={demo_gguf}", f"fp32={bundled().folder}@hf-fp32"]
    options = ["--chat-template", str(template), "--threads", "1", "--slots", "4"]
    with serving(tmp_path_factory.mktemp("log"), [*models, *options]) as running:
        yield running


def eventually(holds: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether something comes true soon."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if holds():
            return True
        time.sleep(0.05)
    return False
