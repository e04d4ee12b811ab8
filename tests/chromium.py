"""A real browser for tests: headless Chromium, driven through its own protocol over two pipes.

No driver and no package: messages are JSON that ends in a NUL byte (--remote-debugging-pipe).
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_TIMEOUT_S = 60.0
_FLAGS = (
    "--headless=new",
    "--no-sandbox",  # tests may run as root, where Chromium has no other way
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--no-first-run",
    "--remote-debugging-pipe",
)


class Chromium:
    """One page of a browser. Use it in a with block; `events` holds what the browser said unasked."""

    def __init__(self) -> None:
        assert BROWSER
        self.events: list[dict[str, Any]] = []
        self._pending, self._last_id, self._session = b"", 0, ""
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        # Away from 3 and 4, which Chromium reads and writes, so that neither is overwritten by the other's copy.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs_in, theirs_out)]

        def place_pipes() -> None:
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        self._process = subprocess.Popen(
            [BROWSER, *_FLAGS, f"--user-data-dir={self._profile.name}", "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=place_pipes,
            close_fds=False,
        )
        for end in (theirs_in, theirs_out, *ends):
            os.close(end)

    def __enter__(self) -> Chromium:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)
        self._profile.cleanup()

    def open(self, page: Path | str, width: int = 1400, *, height: int = 900, dark: bool = False) -> None:
        """Load a file or an address in a window of `width` CSS pixels, a phone's if that is narrow, and wait until it is there."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.call("Page.navigate", url=page if isinstance(page, str) else page.resolve().as_uri())
        self._wait_for("Page.loadEventFired")

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression in the page; AssertionError if it throws."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str, code: int, *, text: str = "", shift: bool = False) -> None:
        """Press and release a key, by its DOM name and Windows' number of it."""
        fields = {"key": key, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **fields)
        self.call("Input.dispatchKeyEvent", type="keyUp", **fields)

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self.call("Input.insertText", text=text)

    def wait_until(self, expression: str) -> None:
        """Wait until a JavaScript expression is true in the page."""
        deadline = time.monotonic() + _TIMEOUT_S
        while not self.evaluate(expression):
            assert time.monotonic() < deadline, f"never true: {expression}"
            time.sleep(0.05)

    def screenshot(self, clip: dict[str, float] | None = None) -> bytes:
        """Return what is seen as a PNG: the window, or `clip` (x, y, width, height) of the whole page."""
        options: dict[str, Any] = (
            {} if clip is None else {"clip": {**clip, "scale": 1}, "captureBeyondViewport": True}
        )
        return base64.b64decode(self.call("Page.captureScreenshot", **options)["data"])

    def said(self, method: str) -> list[dict[str, Any]]:
        """Return the parameters of every event of a kind since the page was opened."""
        return [event["params"] for event in self.events if event["method"] == method]

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and return its result; AssertionError if it is refused."""
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._last_id:
                assert "error" not in answer, (method, answer)
                return answer["result"]
            self.events.append(answer)

    def _wait_for(self, method: str) -> None:
        while not self.said(method):
            self.events.append(self._read())

    def _read(self) -> dict[str, Any]:
        deadline = time.monotonic() + _TIMEOUT_S
        while b"\0" not in self._pending:
            left = max(0.0, deadline - time.monotonic())
            assert select.select([self._in], [], [], left)[0], "Chromium does not answer"
            block = os.read(self._in, 1 << 20)
            assert block, "Chromium is gone"
            self._pending += block
        message, _, self._pending = self._pending.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found
