"""A header on a server: as few bytes as it takes, parts followed, refusals in a line, the token for the Hub alone."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_gguf
from range_server import RangeServer, serve

from ggtool.errors import HubError, UsageError
from ggtool.gguf.problems import MalformedError
from ggtool.gguf.reader import read_header
from ggtool.gguf.remote import parse_place
from ggtool.inspection.opened import open_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    tiny_gguf.gpt2(folder / "tiny.gguf")
    with (folder / "tiny.gguf").open("ab") as file:  # so that there is much that need not be fetched
        file.write(bytes(8 << 20))
    (folder / "page.gguf").write_bytes(b"<!doctype html><html></html>")
    (folder / "empty.gguf").write_bytes(b"")
    words = b"".join(struct.pack("<Q", 300) + bytes([65 + n % 26]) * 300 for n in range(6000))
    array = struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 8, 6000) + words
    (folder / "long.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + array)
    return folder


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with serve(folder) as server:
        yield server


def test_the_header_alone_is_fetched(server: RangeServer, folder: Path) -> None:
    model = open_model(server.url("tiny.gguf"))
    here = read_header(folder / "tiny.gguf")
    assert model.header.tensors == here.tensors
    assert dict(model.header.metadata) == dict(here.metadata)
    assert model.header.array("tokenizer.ggml.tokens") == here.array("tokenizer.ggml.tokens")
    assert model.n_bytes == (folder / "tiny.gguf").stat().st_size
    assert model.n_fetched <= 1 << 19
    assert [asked[1:] for asked in server.asked] == [("bytes=0-524287", "")]
    assert not model.is_local
    with pytest.raises(UsageError, match="not on this machine"):
        _ = model.path


def test_a_server_without_ranges_is_hung_up_on(server: RangeServer, folder: Path) -> None:
    server.takes_ranges = False
    assert open_model(server.url("tiny.gguf")).header.tensors == read_header(folder / "tiny.gguf").tensors


@pytest.mark.parametrize("takes_ranges", [True, False])
def test_a_long_vocabulary_takes_more_requests(server: RangeServer, folder: Path, takes_ranges: bool) -> None:
    server.takes_ranges = takes_ranges
    model = open_model(server.url("long.gguf"))
    ours, here = model.header.array("a"), read_header(folder / "long.gguf").array("a")
    assert all(one == other for one, other in zip(ours, here, strict=True))
    assert len(server.asked) > 1


@pytest.mark.parametrize(
    ("name", "status", "error", "says"),
    [
        ("page.gguf", 200, MalformedError, "an HTML page"),
        ("empty.gguf", 200, MalformedError, "it is empty"),
        ("nothing.gguf", 200, HubError, "no such file"),
        ("tiny.gguf", 403, HubError, "refuses it"),
        ("tiny.gguf", 503, HubError, "failed (503)"),
    ],
)
def test_refusals_are_one_line(server: RangeServer, name: str, status: int, error: type, says: str) -> None:
    server.status = status
    with pytest.raises(error) as caught:
        open_model(server.url(name))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(asked[2] == "" for asked in server.asked)


def test_a_server_that_is_not_there_is_one_line() -> None:
    with pytest.raises(HubError, match="cannot be reached"):
        open_model("http://127.0.0.1:9/model.gguf")


def test_parts_are_followed(server: RangeServer, folder: Path) -> None:
    for number in range(2):
        keys = b"".join(
            struct.pack("<Q", len(key)) + key.encode() + struct.pack("<IH", 2, value)
            for key, value in (("split.no", number), ("split.count", 2))
        )
        tensor = struct.pack("<Q", 1) + b"ab"[number : number + 1] + struct.pack("<IQIQ", 1, 8, 0, 0)
        head = b"GGUF" + struct.pack("<IQQ", 3, 1, 2) + keys + tensor
        (folder / f"m-0000{number + 1}-of-00002.gguf").write_bytes(head + bytes(-len(head) % 32 + 32))
    model = open_model(server.url("m-00001-of-00002.gguf"))
    assert [tensor.name for tensor in model.header.tensors] == ["a", "b"]
    assert not model.problems
    alone = open_model(server.url("m-00002-of-00002.gguf"))
    assert [tensor.name for tensor in alone.header.tensors] == ["b"]


def test_names_of_places() -> None:
    place = parse_place("owner/name/sub/model-Q8_0.gguf")
    assert place is not None
    assert (place.repo_id, place.path, place.file_name) == (
        "owner/name",
        "sub/model-Q8_0.gguf",
        "model-Q8_0.gguf",
    )
    assert place.url.endswith("/owner/name/resolve/main/sub/model-Q8_0.gguf")
    assert str(place.sibling("b.gguf")) == "owner/name/sub/b.gguf"
    at = parse_place("owner/name@v1/model.gguf")
    assert at is not None
    assert (at.repo_id, at.revision) == ("owner/name", "v1")
    browser = parse_place("https://huggingface.co/owner/name/blob/main/model.gguf?download=true")
    assert browser is not None
    assert browser.repo_id == "owner/name"
    for local in ("model.gguf", "./owner/name/model.gguf", "/owner/name/model.gguf", "owner/model.gguf"):
        assert parse_place(local) is None
    with pytest.raises(UsageError, match="not an http"):
        parse_place("file:///etc/passwd")
    secret = parse_place("https://user:word@example.org/model.gguf?token=1")
    assert secret is not None
    assert str(secret) == "https://example.org/model.gguf"
