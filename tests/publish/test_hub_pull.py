"""`ggtool pull` as its users meet it: what comes is what was pushed, or it does not come at all."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from writable_hub import WRITE, Fault, Repo, WritableHub, blob, writable_hub

REPO = "someone/tiny-GGUF"


@pytest.fixture
def server(made_folder: Path) -> Iterator[WritableHub]:
    """A Hub that holds the GGUF files and a card."""
    with writable_hub() as running:
        tree = {path.name: blob(path.read_bytes(), is_lfs=True) for path in made_folder.iterdir()}
        repo = Repo(private=False)
        repo.commit("main", {**tree, "README.md": blob(b"# tiny\n"), ".gitattributes": blob(b"x\n")})
        running.repos[REPO] = repo
        yield running


def content(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def held(server: WritableHub) -> dict[str, str]:
    return {path: one.sha256 for path, one in server.repos[REPO].tree("main").items() if path[0] != "."}


def test_a_repo_arrives_whole_and_only_once(server: WritableHub, run, tmp_path: Path) -> None:
    done = run(server, "pull", REPO, token=None)
    assert done.returncode == 0, done.stderr
    assert "4 files received" in done.stdout
    assert content(tmp_path / "tiny-GGUF") == held(server)
    sent = server.sent.copy()
    again = json.loads(run(server, "pull", REPO, "--json", token=None).stdout)
    assert (again["received"], len(again["kept"])) == ([], 4)
    assert server.sent == sent


def test_only_what_was_asked_for_comes(server: WritableHub, run, tmp_path: Path) -> None:
    done = run(server, "pull", REPO, "--include", "*Q4_0*", "--include", "*.md", "-o", tmp_path / "o")
    assert done.returncode == 0, done.stderr
    assert sorted(content(tmp_path / "o")) == ["README.md", "tiny-gpt2-Q4_0.gguf"]
    none = run(server, "pull", REPO, "--include", "*Q9*", "--quiet")
    assert none.returncode == 1
    assert "nothing in someone/tiny-GGUF matches *Q9*; it holds .gitattributes, README.md" in none.stderr


def test_a_cut_connection_is_taken_up_where_it_was_cut(server: WritableHub, run, tmp_path: Path) -> None:
    server.faults = [Fault("GET .*F16", 1)]
    done = run(server, "pull", REPO)
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "tiny-GGUF") == held(server)
    size = server.repos[REPO].tree("main")["tiny-gpt2-F16.gguf"].size
    # What is lost is less than one of the client's reads.
    assert size <= server.sent["tiny-gpt2-F16.gguf"] < size + (1 << 17)


def test_a_killed_download_goes_on_where_it_was(server: WritableHub, start, run, tmp_path: Path) -> None:
    folder = tmp_path / "tiny-GGUF"
    server.faults = [Fault("GET .*F16", math.inf)]  # half of what is left, each time
    child = start(server, "pull", REPO, "--include", "*F16*")
    while not any(path.stat().st_size for path in folder.glob(".*.partial")):
        time.sleep(0.01)
        assert child.poll() is None
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    assert not (folder / "tiny-gpt2-F16.gguf").exists()
    partial = next(folder.glob(".*.partial")).stat().st_size
    assert partial > 0
    server.faults.clear()
    server.sent.clear()
    done = run(server, "pull", REPO, "--include", "*F16*")
    assert done.returncode == 0, done.stderr
    size = server.repos[REPO].tree("main")["tiny-gpt2-F16.gguf"].size
    assert server.sent["tiny-gpt2-F16.gguf"] == size - partial
    assert [path.name for path in folder.iterdir()] == ["tiny-gpt2-F16.gguf"]
    assert content(folder)["tiny-gpt2-F16.gguf"] == held(server)["tiny-gpt2-F16.gguf"]


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (Fault("GET .*/resolve/", math.inf, 429), "refuses more requests for now (429, rate limit)"),
        (Fault("GET .*/resolve/", math.inf, 503), "the Hub failed (503)"),
        (Fault("GET .*/tree/", math.inf), "broke ("),
    ],
)
def test_each_failure_is_one_line(fault: Fault, says: str, server: WritableHub, run) -> None:
    server.faults = [fault]
    done = run(server, "pull", REPO, "--quiet")
    assert done.returncode == 1
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert WRITE not in done.stderr


def test_other_content_than_listed_is_not_kept(server: WritableHub, run, tmp_path: Path) -> None:
    right = server.repos[REPO].tree("main")["tiny-gpt2-Q4_0.gguf"].data
    server.tampered["tiny-gpt2-Q4_0.gguf"] = right[:-1] + bytes([right[-1] ^ 1])
    done = run(server, "pull", REPO, "--include", "*Q4_0*", "--quiet")
    assert done.returncode == 1
    assert "arrived with a different hash than the Hub lists" in done.stderr
    assert content(tmp_path / "tiny-GGUF") == {}
    server.tampered["tiny-gpt2-Q4_0.gguf"] = right * 3
    more = run(server, "pull", REPO, "--include", "*Q4_0*", "--quiet")
    assert more.returncode == 1
    assert "tiny-gpt2-Q4_0.gguf" not in content(tmp_path / "tiny-GGUF")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "tensors"),
        (b"<!doctype html>", "it is an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "it is a Git LFS pointer"),
    ],
)
def test_a_hostile_gguf_is_not_put_in_place(
    data: bytes, says: str, server: WritableHub, run, tmp_path: Path
) -> None:
    repo = server.repos[REPO]
    repo.commit("main", {"evil.gguf": blob(data, is_lfs=True)})
    done = run(server, "pull", REPO, "--quiet")
    assert done.returncode == 1
    assert "holds a file that was not taken: evil.gguf" in done.stderr
    assert says in done.stderr
    assert content(tmp_path / "tiny-GGUF") == {}


@pytest.mark.parametrize("path", ["a/../../evil.gguf", "/tmp/evil.gguf", "a\x1b[2J"])
def test_a_path_that_leaves_the_folder_is_refused(
    path: str, server: WritableHub, run, tmp_path: Path
) -> None:
    server.planted = [{"type": "file", "path": path, "size": 1, "oid": "0" * 40}]
    before = content(tmp_path)
    done = run(server, "pull", REPO, "--quiet")
    assert done.returncode == 1
    assert "is not a safe path inside the folder" in done.stderr
    assert "\x1b" not in done.stderr
    assert content(tmp_path) == before


def test_a_file_of_ones_own_is_never_replaced_unasked(server: WritableHub, run, tmp_path: Path) -> None:
    mine = tmp_path / "tiny-GGUF" / "README.md"
    mine.parent.mkdir()
    mine.write_text("mine\n")
    done = run(server, "pull", REPO, "--quiet")
    assert done.returncode == 1
    assert "README.md exists with different content; pass --force to replace it" in done.stderr
    assert content(mine.parent) == {"README.md": hashlib.sha256(b"mine\n").hexdigest()}
    assert run(server, "pull", REPO, "--force").returncode == 0
    assert content(mine.parent) == held(server)


def test_what_the_hub_does_not_have_is_said(server: WritableHub, run) -> None:
    missing = run(server, "pull", "no/such", "--quiet", token=None)
    assert missing.returncode == 1
    assert "the Hub has no repo no/such that you may read" in missing.stderr
    revision = run(server, "pull", REPO, "--revision", "v9", "--quiet")
    assert revision.returncode == 1
    assert "someone/tiny-GGUF has no such revision" in revision.stderr


def test_a_checkpoint_comes_from_the_same_server_and_goes_back_as_gguf(
    tiny_gpt2: Path, run, tmp_path: Path
) -> None:
    with writable_hub() as server:
        repo = Repo(private=False)
        tree = {path.name: path.read_bytes() for path in tiny_gpt2.iterdir()}
        commit = repo.commit(
            "main",
            {name: blob(data, is_lfs=name.endswith(".safetensors")) for name, data in tree.items()},
        )
        server.repos["someone/tiny"] = repo
        server.faults = [Fault("GET .*safetensors", 1)]
        folder = tmp_path / "made"
        made = run(server, "convert", "--model", "someone/tiny", "--qtype", "q4_0", "--out", f"{folder}/")
        assert made.returncode == 0, made.stderr
        assert server.faults[0].times == 0
        carded = run(server, "card", folder, "--model", "someone/tiny", "--revision", commit, "--quiet")
        assert carded.returncode == 0, carded.stderr
        card = (folder / "README.md").read_text()
        assert "base_model: someone/tiny\n" in card
        assert f"--model someone/tiny --revision {commit}" in card
        pushed = run(server, "push", folder, "someone/tiny-GGUF")
        assert pushed.returncode == 0, pushed.stderr
        assert "tiny-Q4_0.gguf" in server.repos["someone/tiny-GGUF"].tree("main")
