"""Enough of the Hub's protocol, on a local port, for huggingface_hub to resolve and download one small repo."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Handler(BaseHTTPRequestHandler):
    """Serves `server.folder` as the repo `server.repo_id`, whose only branch is main."""

    server: HubServer

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        api, files = f"/api/models/{self.server.repo_id}", f"/{self.server.repo_id}/resolve/{COMMIT}/"
        self.server.requests.append(f"{self.command} {path}")
        if path in (f"{api}/revision/main", f"{api}/revision/{COMMIT}", api):
            self.reply_json({"id": self.server.repo_id, "sha": COMMIT, "siblings": []})
        elif path.startswith(f"{api}/revision/"):
            self.reply(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif path == f"{api}/tree/{COMMIT}":
            self.reply_json([self.describe(file) for file in sorted(self.server.folder.iterdir())])
        elif path.startswith(files) and (self.server.folder / path.removeprefix(files)).is_file():
            self.send_file(self.server.folder / path.removeprefix(files))
        else:
            self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})

    @staticmethod
    def describe(file: Path) -> dict[str, object]:
        data = file.read_bytes()
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        return {"type": "file", "path": file.name, "size": len(data), "oid": oid}

    def send_file(self, file: Path) -> None:
        data = file.read_bytes()
        headers = {
            "ETag": f'"{self.describe(file)["oid"]}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if self.server.cuts and self.command == "GET" and file.suffix == ".safetensors":
            self.server.cuts -= 1
            self.send_response(206 if start else 200)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            self.wfile.write(data[start : len(data) // 2])
            self.close_connection = True
            return
        if self.command == "GET":
            self.server.sent[file.name] = self.server.sent.get(file.name, 0) + len(data) - start
        self.reply(206 if start else 200, data[start:], headers)

    def reply_json(self, content: object) -> None:
        self.reply(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def reply(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_args: object) -> None:
        return


class HubServer(ThreadingHTTPServer):
    """The server, what it was asked and how many bytes of a file it sent to the end.

    While `cuts` lasts, it drops the connection in the middle of the weights.
    """

    def __init__(self, repo_id: str, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repo_id, self.folder, self.cuts = repo_id, folder, 0.0
        self.requests: list[str] = []
        self.sent: dict[str, int] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def hub(repo_id: str, folder: Path) -> Iterator[HubServer]:
    """Serve `folder` as `repo_id` for as long as the block runs."""
    with HubServer(repo_id, folder) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
