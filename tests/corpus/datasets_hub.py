"""Enough of the Hub's protocol for `datasets` to describe, stream and download one data set of Parquet files."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "fedcba9876543210fedcba9876543210fedcba98"


class _Handler(BaseHTTPRequestHandler):
    """Serves `server.folder` as the data set `server.repo_id`, at one commit that `server.revision` names too."""

    protocol_version = "HTTP/1.1"
    server: DatasetsHub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        path = unquote(urlsplit(self.path).path)
        if "/paths-info/" not in path:
            return self.reply(404, b"", {})
        asked = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
        found = [self.describe(self.server.folder / name) for name in asked if self.exists(name)]
        return self.reply_json(found)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        api = f"/api/datasets/{self.server.repo_id}"
        self.server.requests.append(f"{self.command} {path}")
        if path in (api, *(f"{api}/revision/{name}" for name in (self.server.revision, COMMIT))):
            self.reply_json({"id": self.server.repo_id, "sha": COMMIT, "siblings": []})
        elif path.startswith(f"{api}/tree/{COMMIT}"):
            below = self.server.folder / path.removeprefix(f"{api}/tree/{COMMIT}").strip("/")
            deep = "recursive=True" in self.path or "recursive=true" in self.path
            files = sorted(below.rglob("*") if deep else below.iterdir()) if below.is_dir() else []
            if below.is_dir():
                self.reply_json([self.describe(file) for file in files])
            else:
                self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
        elif f"/{self.server.repo_id}/resolve/" in path:
            name = path.partition("/resolve/")[2].removeprefix(self.server.revision).removeprefix(COMMIT)
            self.send_file(name.strip("/"))
        else:
            self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})

    def exists(self, name: str) -> bool:
        return (self.server.folder / name).exists()

    def describe(self, file: Path) -> dict[str, object]:
        name = str(file.relative_to(self.server.folder))
        if file.is_dir():
            return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
        return {"type": "file", "path": name, "size": file.stat().st_size, "oid": _oid(file)}

    def send_file(self, name: str) -> None:
        file = self.server.folder / name
        if not file.is_file():
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
        data = file.read_bytes()
        headers = {"ETag": f'"{_oid(file)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        asked = self.headers.get("Range")
        if asked is None:
            status, part = 200, data
        else:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            end = min(int(last or len(data)), len(data) - 1)
            status, part = 206, data[int(first) : end + 1]
            headers["Content-Range"] = f"bytes {first}-{end}/{len(data)}"
        if self.command == "GET":
            self.server.sent += len(part)
        return self.reply(status, part, headers)

    def reply_json(self, content: object) -> None:
        self.reply(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def reply(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_args: object) -> None:
        return


def _oid(file: Path) -> str:
    data = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class DatasetsHub(ThreadingHTTPServer):
    """The server, what it was asked for, and how many bytes of files it sent."""

    daemon_threads = True

    def __init__(self, repo_id: str, revision: str, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repo_id, self.revision, self.folder = repo_id, revision, folder
        self.requests: list[str] = []
        self.sent = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def datasets_hub(repo_id: str, revision: str, folder: Path) -> Iterator[DatasetsHub]:
    """Serve `folder` as the data set `repo_id` for as long as the block runs."""
    with DatasetsHub(repo_id, revision, folder) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
