"""A small Hub on a local port that keeps what is pushed to it: the protocol as huggingface_hub speaks it, in memory.

Covered: whoami, repo creation, front matter validation, preupload, the Git LFS batch with single and multipart
uploads, commits, pull requests as refs, the tree, and downloads with ranges. Of Xet storage: tokens and the upload of blocks,
whose content is counted and not put together, so such a file is known by its hash and cannot be downloaded. Not covered:
Git itself, pages of a long tree, and storage on another host. Clients that run with HF_HUB_DISABLE_XET=1 use Git LFS.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import threading
import time
from base64 import b64decode
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

WRITE, READ = "hf_" + "w" * 34, "hf_" + "r" * 34
"""Tokens of the user `someone`, who belongs to no organization."""
USER = "someone"
_LFS_FROM = 4096  # bytes; .gguf files always


@dataclass(frozen=True)
class Blob:
    """A file: its content, or b"" where Xet has it; whether it is kept as a large file."""

    data: bytes
    size: int
    sha256: str
    is_lfs: bool

    @property
    def oid(self) -> str:
        if self.is_lfs:
            return hashlib.sha1(self.sha256.encode()).hexdigest()
        return hashlib.sha1(b"blob %d\0" % self.size + self.data).hexdigest()


def blob(data: bytes, *, is_lfs: bool = False) -> Blob:
    return Blob(data, len(data), hashlib.sha256(data).hexdigest(), is_lfs)


@dataclass
class Repo:
    """Commits are whole trees, path -> content; refs name the newest of each branch or pull request."""

    private: bool
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, tree: dict[str, Blob]) -> str:
        content = repr(sorted((path, one.sha256) for path, one in tree.items()))
        oid = hashlib.sha1(f"{content}{len(self.commits)}".encode()).hexdigest()
        self.commits[oid] = tree
        self.refs[ref] = oid
        return oid

    def tree(self, revision: str) -> dict[str, Blob] | None:
        return self.commits.get(self.refs.get(revision, revision))


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose "METHOD /path" matches `pattern`.

    status: the answer. None cuts the connection: after half of a download's bytes, otherwise at once with a reset.
    """

    pattern: str
    times: float
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WritableHub

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def do_PUT(self) -> None:
        self.answer()

    def answer(self) -> None:
        url = urlsplit(self.path)
        path, self.query = unquote(url.path), parse_qs(url.query)
        asked = f"{self.command} {path}"
        self.server.requests.append(asked)
        for fault in self.server.faults:
            if fault.times > 0 and re.search(fault.pattern, asked):
                fault.times -= 1
                if fault.status is not None:
                    self.read_body()
                    return self.reply(fault.status, b"refused", fault.headers)
                if "/resolve/" in path:
                    self.cut = True
                    break
                return self.reset()
        for method, pattern, action in _ROUTES:
            if self.command in method and (match := re.fullmatch(pattern, path)):
                return action(self, *match.groups())
        self.read_body()
        return self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})

    cut = False
    commit_oid = ""

    # Who may do what

    @property
    def role(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        return self.server.tokens.get(token)

    def may_write(self, repo_id: str) -> bool:
        """Whether the token may write to the repo; if not, the answer was given."""
        if self.role is None:
            self.reply(401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif self.role != "write" or not repo_id.startswith(f"{USER}/"):
            self.reply(403, b"", {"X-Error-Message": "You don't have the rights to write here"})
        else:
            return True
        return False

    def found(self, repo_id: str) -> Repo | None:
        """The repo, if it is there and may be read; if not, the answer was given."""
        repo = self.server.repos.get(repo_id)
        if repo is None or (repo.private and self.role is None):
            self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})
            return None
        return repo

    # Accounts and repos

    def whoami(self) -> None:
        if self.role is None:
            return self.reply(401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"})
        token = {"displayName": "t", "role": self.role}
        return self.reply_json({"type": "user", "name": USER, "auth": {"accessToken": token}, "orgs": []})

    def create(self) -> None:
        asked = json.loads(self.read_body())
        repo_id = f"{asked.get('organization') or USER}/{asked['name']}"
        if not self.may_write(repo_id):
            return None
        repo_url = f"{self.server.url}/{repo_id}"
        if repo_id in self.server.repos:
            return self.reply_json({"error": "You already created this model repo", "url": repo_url}, 409)
        repo = Repo(private=asked.get("private", False) or asked.get("visibility") == "private")
        repo.commit("main", {".gitattributes": blob(b"*.gguf filter=lfs diff=lfs merge=lfs -text\n")})
        self.server.repos[repo_id] = repo
        return self.reply_json({"url": repo_url})

    def info(self, repo_id: str, revision: str | None = None) -> None:
        if (repo := self.found(repo_id)) is None:
            return None
        revision = revision or "main"
        if repo.tree(revision) is None:
            return self.reply(404, b"", {"X-Error-Code": "RevisionNotFound"})
        sha = repo.refs.get(revision, revision)
        return self.reply_json({"id": repo_id, "sha": sha, "private": repo.private, "siblings": []})

    def tree(self, repo_id: str, revision: str) -> None:
        if (repo := self.found(repo_id)) is None:
            return None
        if (tree := repo.tree(revision)) is None:
            return self.reply(404, b"", {"X-Error-Code": "RevisionNotFound"})
        listed = [self.describe(path, one) for path, one in sorted(tree.items())]
        return self.reply_json(listed + self.server.planted)

    @staticmethod
    def describe(path: str, one: Blob) -> dict[str, object]:
        facts: dict[str, object] = {"type": "file", "path": path, "size": one.size, "oid": one.oid}
        if one.is_lfs:
            facts["lfs"] = {"oid": one.sha256, "size": one.size, "pointerSize": 134}
        return facts

    def validate(self) -> None:
        content = json.loads(self.read_body())["content"]
        matter = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        try:
            good = isinstance(yaml.safe_load(matter[1]) if matter else {}, dict)
        except yaml.YAMLError:
            good = False
        errors = [] if good else [{"message": "front matter is no YAML mapping"}]
        self.reply_json({"errors": errors, "warnings": []}, 200 if good else 400)

    # Uploads

    def preupload(self, repo_id: str, revision: str) -> None:
        asked = json.loads(self.read_body())["files"]
        if not self.may_write(repo_id) or (repo := self.found(repo_id)) is None:
            return None
        there = repo.tree(revision) or {}
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if _goes_to_lfs(file["path"], file["size"]) else "regular",
                "shouldIgnore": False,
                "oid": there[file["path"]].oid if file["path"] in there else None,
            }
            for file in asked
        ]
        return self.reply_json({"files": files})

    def batch(self, repo_id: str) -> None:
        asked = json.loads(self.read_body())
        if not self.may_write(repo_id):
            return None
        objects = []
        for one in asked["objects"]:
            oid, size = one["oid"], one["size"]
            known = {"oid": oid, "size": size}
            if oid not in self.server.lfs:
                known["actions"] = {
                    "upload": self.upload_action(oid, size),
                    "verify": {"href": f"{self.server.url}/lfs/verify"},
                }
            objects.append(known)
        return self.reply_json({"transfer": "multipart", "objects": objects})

    def upload_action(self, oid: str, size: int) -> dict[str, object]:
        part = self.server.part_bytes
        if size <= part:
            return {"href": f"{self.server.url}/lfs/put/{oid}"}
        upload = len(self.server.parts)
        self.server.parts.append({})
        urls = {
            str(n + 1): f"{self.server.url}/lfs/part/{upload}/{oid}/{n + 1}" for n in range(-(-size // part))
        }
        return {
            "href": f"{self.server.url}/lfs/complete/{upload}/{oid}",
            "header": {"chunk_size": str(part), **urls},
        }

    def put(self, oid: str) -> None:
        data = self.receive(oid, 1)
        if hashlib.sha256(data).hexdigest() != oid:
            return self.reply(400, b"", {"X-Error-Message": "content does not match its hash"})
        self.server.lfs[oid] = data
        return self.reply(200, b"", {})

    def put_part(self, upload: str, oid: str, number: str) -> None:
        data = self.receive(oid, int(number))
        self.server.parts[int(upload)][int(number)] = data
        self.reply(200, b"", {"ETag": hashlib.md5(data).hexdigest()})

    def receive(self, oid: str, number: int) -> bytes:
        """Read an upload; where the test asked for it, say so, wait, and never take it."""
        if self.server.n_uploads_before_hold == 0:
            self.server.held.set()
            self.server.released.wait()
            self.reset()
        self.server.n_uploads_before_hold -= 1
        data = self.read_body()
        self.server.uploads[oid, number] += 1
        return data

    def complete(self, upload: str, oid: str) -> None:
        asked = json.loads(self.read_body())
        parts = self.server.parts[int(upload)]
        data = b"".join(parts[part["partNumber"]] for part in asked["parts"])
        if hashlib.sha256(data).hexdigest() != oid:
            return self.reply(400, b"", {"X-Error-Message": "content does not match its hash"})
        self.server.lfs[oid] = data
        return self.reply_json({})

    def verify(self) -> None:
        asked = json.loads(self.read_body())
        stored = self.server.lfs.get(asked["oid"])
        self.reply(200 if stored is not None and len(stored) == asked["size"] else 404, b"", {})

    # Xet: tokens, blocks and the lists that say which blocks are a file

    def xet_token(self, repo_id: str, _revision: str) -> None:
        if self.may_write(repo_id):
            expiry = int(time.time()) + 3600
            self.reply_json({"accessToken": "x", "exp": expiry, "casUrl": f"{self.server.url}/xet"})

    def put_block(self, sha256: str) -> None:
        self.receive(sha256, 1)
        self.reply_json({"was_inserted": True})

    def put_shard(self) -> None:
        self.read_body()
        self.reply_json({"result": 1})

    # Commits

    def commit(self, repo_id: str, revision: str) -> None:
        lines = [json.loads(line) for line in self.read_body().splitlines()]
        if not self.may_write(repo_id) or (repo := self.found(repo_id)) is None:
            return None
        parent = lines[0]["value"].get("parentCommit")
        if parent is not None and parent != repo.refs[revision]:
            return self.reply(412, b"", {"X-Error-Message": "A commit has happened since."})
        tree = dict(repo.tree(revision) or {})
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "lfsFile":
                stored = self.server.lfs.get(value["oid"], b"")
                tree[value["path"]] = Blob(stored, value["size"], value["oid"], is_lfs=True)
            else:
                tree[value["path"]] = blob(b64decode(value["content"]))
        if self.server.corrupts:
            path = lines[-1]["value"]["path"]
            tree[path] = blob(tree[path].data + b"!", is_lfs=True)
        pull_request = f"refs/pr/{len(repo.refs)}" if "create_pr" in self.query else None
        oid = repo.commit(pull_request or revision, tree)
        if self.server.loses_commit_reply:
            self.server.loses_commit_reply = False
            return self.reset()
        number = pull_request and pull_request.rpartition("/")[2]
        return self.reply_json(
            {
                "commitUrl": f"{self.server.url}/{repo_id}/commit/{oid}",
                "commitOid": oid,
                "pullRequestUrl": number and f"{self.server.url}/{repo_id}/discussions/{number}",
            }
        )

    # Downloads

    def resolve(self, repo_id: str, rest: str) -> None:
        if (repo := self.found(repo_id)) is None:
            return None
        for revision in [*repo.refs, *repo.commits]:
            if rest.startswith(f"{revision}/") and (path := rest.removeprefix(f"{revision}/")) in repo.tree(
                revision
            ):
                self.commit_oid = repo.refs.get(revision, revision)
                return self.send_file(path, repo.tree(revision)[path])
        return self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})

    def send_file(self, path: str, one: Blob) -> None:
        data = self.server.tampered.get(path, one.data)
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        etag = one.sha256 if one.is_lfs else one.oid
        headers = {"ETag": f'"{etag}"', "Accept-Ranges": "bytes", "X-Repo-Commit": self.commit_oid}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        part = data[start:]
        if self.cut:
            self.send_head(206 if start else 200, headers, len(part))
            self.wfile.write(part[: len(part) // 2])
            self.server.sent[path] += len(part) // 2
            self.close_connection = True
            return None
        if self.command == "GET":
            self.server.sent[path] += len(part)
        return self.reply(206 if start else 200, part, headers)

    # HTTP

    def read_body(self) -> bytes:
        if "chunked" not in (self.headers.get("Transfer-Encoding") or ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def reset(self) -> None:
        """Close so that the client sees a reset and not the end of an answer."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()
        raise ConnectionResetError

    def reply_json(self, content: object, status: int = 200) -> None:
        self.reply(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def reply(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_head(status, headers, len(data))
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_head(self, status: int, headers: dict[str, str], n_bytes: int) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(n_bytes))
        self.end_headers()

    def log_message(self, *_args: object) -> None:
        return


def _goes_to_lfs(path: str, size: int) -> bool:
    return path.endswith(".gguf") or (size > _LFS_FROM and path.endswith(".png"))


_REPO = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    (("GET",), "/api/whoami-v2", _Handler.whoami),
    (("POST",), "/api/repos/create", _Handler.create),
    (("POST",), "/api/validate-yaml", _Handler.validate),
    (("GET",), f"/api/models/{_REPO}", _Handler.info),
    (("GET",), f"/api/models/{_REPO}/revision/(.+)", _Handler.info),
    (("GET",), f"/api/models/{_REPO}/tree/(.+?)", _Handler.tree),
    (("POST",), f"/api/models/{_REPO}/preupload/(.+)", _Handler.preupload),
    (("POST",), f"/api/models/{_REPO}/commit/(.+)", _Handler.commit),
    (("POST",), rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    (("PUT",), "/lfs/put/([0-9a-f]{64})", _Handler.put),
    (("PUT",), r"/lfs/part/(\d+)/([0-9a-f]{64})/(\d+)", _Handler.put_part),
    (("POST",), r"/lfs/complete/(\d+)/([0-9a-f]{64})", _Handler.complete),
    (("POST",), "/lfs/verify", _Handler.verify),
    (("GET",), f"/api/models/{_REPO}/xet-write-token/(.+)", _Handler.xet_token),
    (("POST",), "/xet/v1/xorbs/default/([0-9a-f]{64})", _Handler.put_block),
    (("POST",), "/xet/v1/shards", _Handler.put_shard),
    (("GET", "HEAD"), f"/{_REPO}/resolve/(.+)", _Handler.resolve),
]


class WritableHub(ThreadingHTTPServer):
    """The server, what it holds, what it was asked, and what is to go wrong.

    uploads counts the finished uploads by (sha256, part), or by Xet's own hash of a block. After `n_uploads_before_hold` of them the next one is held until
    `released`, and `held` is set. `planted` are entries that every tree lists besides its own; `tampered` is what is sent in place of a file.
    """

    daemon_threads = True

    def __init__(self, part_bytes: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.part_bytes = part_bytes
        self.tokens = {WRITE: "write", READ: "read"}
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.parts: list[dict[int, bytes]] = []
        self.uploads: Counter[tuple[str, int]] = Counter()
        self.sent: Counter[str] = Counter()
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.planted: list[dict[str, object]] = []
        self.tampered: dict[str, bytes] = {}
        self.n_uploads_before_hold = -1
        self.held, self.released = threading.Event(), threading.Event()
        self.corrupts = self.loses_commit_reply = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed is no error of the server's."""


@contextmanager
def writable_hub(*, part_bytes: int = 1 << 20) -> Iterator[WritableHub]:
    """Run a Hub for as long as the block; files above `part_bytes` are uploaded in parts of that size."""
    with WritableHub(part_bytes) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
            thread.join()
