"""`ggtool inspect` of a file on the Hub, and `ggtool verify --against` it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from writable_hub import Repo, WritableHub, blob, writable_hub

REPO, NAME = "someone/tiny-GGUF", "tiny-gpt2-Q4_0.gguf"


@pytest.fixture
def server(made_folder: Path) -> Iterator[WritableHub]:
    """A private repo with one GGUF file."""
    with writable_hub() as running:
        repo = Repo(private=True)
        repo.commit("main", {NAME: blob((made_folder / NAME).read_bytes(), is_lfs=True)})
        running.repos[REPO] = repo
        yield running


def test_a_file_on_the_hub_is_inspected_by_its_header(server: WritableHub, run, made_folder: Path) -> None:
    done = run(server, "inspect", f"{REPO}/{NAME}", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["n_bytes"] == (made_folder / NAME).stat().st_size
    assert found["llama_cpp"] is None
    assert {tensor["type"] for tensor in found["tensors"]} == {"Q4_0", "Q6_K", "F32"}
    refused = run(server, "inspect", f"{REPO}/{NAME}", token=None)
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr


def test_a_file_is_compared_with_the_hub_s(
    server: WritableHub, run, made_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / NAME
    path.write_bytes((made_folder / NAME).read_bytes())
    assert run(server, "verify", path, "--against", REPO).returncode == 0
    data = bytearray(path.read_bytes())
    data[-40] ^= 1
    path.write_bytes(data)
    done = run(server, "verify", path, "--against", f"{REPO}/{NAME}", "--json")
    assert done.returncode == 1
    assert "hub-content" in {one["code"] for one in json.loads(done.stdout)["findings"]}
    other = path.rename(tmp_path / "other.gguf")
    lost = run(server, "verify", other, "--against", REPO)
    assert lost.returncode == 1
    assert "has no file other.gguf" in lost.stderr
