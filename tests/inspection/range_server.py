"""Files on a local port, by ranges or not, with what was asked for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class _Handler(BaseHTTPRequestHandler):
    server: RangeServer

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        self.server.asked.append((name, self.headers.get("Range", ""), self.headers.get("Authorization", "")))
        path = self.server.folder / name
        if self.server.status != 200 or not path.is_file():
            self.send_response(404 if self.server.status == 200 else self.server.status)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = path.read_bytes()
        if not data:
            self.send_response(416)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        begin, end = int(first), min(int(last) + 1 if last else len(data), len(data))
        if not self.server.takes_ranges:
            begin, end = 0, len(data)
        self.send_response(206 if self.server.takes_ranges else 200)
        if self.server.takes_ranges:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(data)}")
        self.send_header("Content-Length", str(end - begin))
        self.end_headers()
        try:
            self.wfile.write(data[begin:end])
        except (BrokenPipeError, ConnectionResetError):
            self.server.hung_up += 1

    def log_message(self, *_args: object) -> None:
        return


class RangeServer(ThreadingHTTPServer):
    """Serves `folder`; `asked` holds (file, range, authorization) of every request."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.takes_ranges, self.status, self.hung_up = folder, True, 200, 0
        self.asked: list[tuple[str, str, str]] = []

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


@contextmanager
def serve(folder: Path) -> Iterator[RangeServer]:
    with RangeServer(folder) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
