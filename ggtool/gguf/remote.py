"""The first bytes of a file on a server, fetched by range requests as far as its header asks for them.

A place is a URL, or OWNER/NAME/path/file.gguf on the Hub (a revision may follow: OWNER/NAME@REVISION/file.gguf). The
user's token goes to the Hub alone; a server that ignores ranges is read from the start and hung up on in time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from ggtool.errors import GgtoolError, HubError, UsageError

# The first request holds most headers without a vocabulary; each later one asks for twice as much.
_FIRST_BYTES, _MOST_AT_ONCE = 1 << 19, 1 << 24
# The largest header known (262,144 tokens and 514,906 merges) has 16 MB.
_MOST_BYTES = 1 << 27
_TIMEOUT_S = 30.0
_HUB_PATH = re.compile(
    r"([\w.-]+/[\w.-]+?)(?:@([\w.-]+))?/((?:[^/]+/)*[^/]+\.gguf)", re.ASCII | re.IGNORECASE
)
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


@dataclass(frozen=True)
class Place:
    """A file on a server: repo_id and revision are empty where it is not on the Hub."""

    url: str
    repo_id: str = ""
    revision: str = ""
    path: str = ""

    @property
    def file_name(self) -> str:
        """The file's own name."""
        return PurePosixPath(unquote(urlsplit(self.url).path)).name or "model.gguf"

    def __str__(self) -> str:
        if not self.repo_id:
            # Without what may be secret: a name and a password, and a signed query.
            parts = urlsplit(self.url)
            return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
        return f"{self.repo_id}{'@' + self.revision if self.revision else ''}/{self.path}"

    def sibling(self, name: str) -> Place:
        """Return the place of another file in the same folder."""
        if self.repo_id:
            return hub_place(self.repo_id, str(PurePosixPath(self.path).with_name(name)), self.revision)
        parts = urlsplit(self.url)
        path = parts.path.rpartition("/")[0] + "/" + quote(name)
        return Place(parts._replace(path=path).geturl())


def parse_place(text: str, revision: str | None = None) -> Place | None:
    """Return the place that `text` names, or None where it can only be a local path; UsageError for other URLs."""
    if text.startswith("hf://"):
        text = text.removeprefix("hf://").removeprefix("models/")
    elif "://" in text:
        parts = urlsplit(text)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"{text} is not an http or https address.")
        found = _on_the_hub(text)
        return found or Place(text)
    match = _HUB_PATH.fullmatch(text)
    if match is None or text.startswith((".", "/", "~")):
        return None
    return hub_place(match[1], match[3], revision or match[2] or "")


def hub_place(repo_id: str, path: str, revision: str = "") -> Place:
    """Return the place of a file of a Hub repo at a revision, main by default."""
    from huggingface_hub import hf_hub_url

    return Place(hf_hub_url(repo_id, path, revision=revision or None), repo_id, revision, path)


def _on_the_hub(url: str) -> Place | None:
    from huggingface_hub.constants import ENDPOINT

    for endpoint in (ENDPOINT, "https://hf.co"):
        if url.startswith(endpoint + "/"):
            pattern = r"([\w.-]+/[\w.-]+)/(?:resolve|blob|raw)/([^/]+)/([^?#]+)"
            match = re.fullmatch(pattern + r"(?:\?.*)?", url.removeprefix(endpoint + "/"))
            if match:
                return hub_place(match[1], unquote(match[3]), unquote(match[2]))
    return None


class RangeSource:
    """A `ByteSource` whose bytes are fetched when they are needed; `n_fetched` counts them, `n_requests` the requests."""

    def __init__(self, place: Place) -> None:
        """Fetch the first bytes; HubError if the server does not give them."""
        self.place = place
        self.data = bytearray()
        self.n_fetched = self.n_requests = 0
        self.size = 0
        self._fetch(_FIRST_BYTES)

    def need(self, stop: int) -> None:
        """Fetch up to byte `stop`, and more at a time the more was needed; HubError beyond 128 MiB."""
        if stop <= len(self.data):
            return
        if stop > _MOST_BYTES:
            raise HubError(
                f"{self.place}: the header is larger than {_MOST_BYTES >> 20} MiB; download the file to see it."
            )
        step = min(len(self.data), _MOST_AT_ONCE)
        self._fetch(min(max(stop, len(self.data) + step), self.size, _MOST_BYTES))
        if len(self.data) < stop:
            raise HubError(f"{self.place}: the server sent fewer bytes than it had announced; try again.")

    def _fetch(self, stop: int) -> None:
        from huggingface_hub.utils._http import get_session

        begin = len(self.data)
        headers = {
            "Range": f"bytes={begin}-{stop - 1}",
            "Accept-Encoding": "identity",
            **_authorization(self.place),
        }
        self.n_requests += 1
        with (
            _explained(self.place),
            get_session().stream(
                "GET", self.place.url, headers=headers, follow_redirects=True, timeout=_TIMEOUT_S
            ) as response,
        ):
            skip = self._check(response, begin)
            for block in response.iter_raw():
                self.n_fetched += len(block)
                self.data += block[skip:]
                skip = max(0, skip - len(block))
                if len(self.data) >= min(stop, self.size):
                    break
        del self.data[min(stop, self.size) :]

    def _check(self, response: Any, begin: int) -> int:
        """Note the file's size; return how many bytes come before `begin` in the answer."""
        status = response.status_code
        if status == 416 and not begin:  # an empty file has no ranges
            return 0
        if status not in (200, 206):
            raise HubError(f"{self.place}: {_refusal(status, self.place)}")
        if response.headers.get("content-encoding", "identity") != "identity":
            raise HubError(f"{self.place}: the server compresses what it sends, so ranges mean nothing.")
        found = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
        if status == 206:
            if found is None or int(found[1]) != begin:
                raise HubError(f"{self.place}: the server answered another range than it was asked for.")
            size = int(found[3])
        else:
            size = int(response.headers.get("content-length") or -1)
            if size < 0:
                raise HubError(f"{self.place}: the server does not say how long the file is.")
        if begin and size != self.size:
            raise HubError(f"{self.place} changed while it was read; try again.")
        self.size = size
        return 0 if status == 206 else begin


def _authorization(place: Place) -> dict[str, str]:
    if not place.repo_id:
        return {}
    from huggingface_hub.utils._headers import build_hf_headers

    return dict(build_hf_headers())


def _refusal(status: int, place: Place) -> str:
    if status in (401, 403):
        return (
            "the server refuses it (private or gated? `hf auth login`)."
            if place.repo_id
            else f"the server refuses it ({status})."
        )
    if status == 404:
        return "there is no such file there; check the name."
    if status == 429:
        return "the server refuses more requests for now (429); wait some minutes."
    return f"the server failed ({status}); try again later."


@contextmanager
def _explained(place: Place) -> Iterator[None]:
    try:
        yield
    except GgtoolError:
        raise
    except Exception as error:  # noqa: BLE001  # httpx's or httpx2's own errors come through, by the client's version
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
        raise HubError(f"{place} cannot be reached: {reason}.") from None
