"""Where a model comes from: a folder, the Hub (a local server that speaks its protocol), the bundled one."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_server import COMMIT, hub

from ggtool.errors import SourceError, UsageError
from ggtool.source.resolve import BUNDLED_NAME, DEFAULT_REPO_ID, bundled, from_folder, resolve

# Nothing listens on the discard port of a machine without inetd.
NO_HUB = "http://127.0.0.1:9"

# In a child, for huggingface_hub reads its environment when it is imported.
_RESOLVE = """
import json, sys
from huggingface_hub import constants
from ggtool.errors import GgtoolError
from ggtool.source.resolve import resolve
constants.DOWNLOAD_CHUNK_SIZE = 1 << 20  # a cut loses a chunk, and 10 MiB are more than the whole model
notes = []
try:
    found = resolve(json.loads(sys.argv[1]), json.loads(sys.argv[2]), notes.append, allow_pickle=json.loads(sys.argv[3]))
    facts = {"name": found.name, "model": found.model, "revision": found.revision, "folder": str(found.folder),
             "files": sorted(path.name for path in found.folder.iterdir())}
except GgtoolError as error:
    facts = {"error": str(error), "exit_code": error.exit_code}
print(json.dumps({**facts, "notes": notes}))
"""


def resolve_in_child(
    endpoint: str, cache: Path, model: str | None, revision: str | None = None, *, allow_pickle: bool = False
) -> dict[str, Any]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", _RESOLVE, *map(json.dumps, (model, revision, allow_pickle))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr[-3000:]
    facts: dict[str, Any] = json.loads(done.stdout)
    assert "\n" not in facts.get("error", "")
    return facts


def notes() -> list[str]:
    return []


def test_a_folder_is_used_as_it_is(tiny_gpt2: Path) -> None:
    source = resolve(str(tiny_gpt2), None, notes().append)
    assert (source.name, source.model, source.revision, source.folder) == (
        tiny_gpt2.name,
        tiny_gpt2.name,
        "",
        tiny_gpt2,
    )
    assert source.config["n_embd"] == 256
    assert source.weights["wte.weight"].shape == (512, 256)


def test_a_folders_hash_follows_weights_and_vocabulary(tiny_gpt2: Path, tmp_path: Path) -> None:
    before = from_folder(tiny_gpt2).sha256
    copy = shutil.copytree(tiny_gpt2, tmp_path / "copy")
    assert from_folder(copy).sha256 == before
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        data = bytearray((copy / name).read_bytes())
        data[-20] ^= 1
        (copy / name).write_bytes(data)
        assert from_folder(copy).sha256 != before
        shutil.copy(tiny_gpt2 / name, copy)
    (copy / "README.md").write_text("words")
    assert from_folder(copy).sha256 == before


@pytest.mark.parametrize(
    ("model", "revision", "error", "message"),
    [
        ("{empty}", None, SourceError, "holds no config.json"),
        ("{empty}", "main", UsageError, "--revision belongs to a Hub repo"),
        ("{file}", None, UsageError, "is a file"),
        ("{file}", "main", UsageError, "--revision belongs to a Hub repo, and .* is a file"),
        ("./no/such/folder", None, SourceError, "there is no folder"),
        ("~/no/such/folder", None, SourceError, "there is no folder"),
    ],
)
def test_what_can_be_neither_folder_nor_repo(
    model: str, revision: str | None, error: type[Exception], message: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    named = model.format(empty=tmp_path / "empty", file=tmp_path / "file")
    with pytest.raises(error, match=message):
        resolve(named, revision, notes().append)


def test_the_bundled_model_is_there() -> None:
    if not (Path(__file__).parents[2] / "models" / BUNDLED_NAME / "config.json").exists():
        pytest.skip(f"models/{BUNDLED_NAME} is not made yet")
    assert bundled().name == BUNDLED_NAME


def test_a_repo_is_downloaded_once_and_only_what_is_needed(tiny_gpt2: Path, tmp_path: Path) -> None:
    repo = shutil.copytree(tiny_gpt2, tmp_path / "repo")
    unwanted = (
        "pytorch_model.bin",
        "modeling.py",
        "model.onnx",
        "model.fp16.safetensors",
        "consolidated.safetensors",
    )
    for name in unwanted:
        (repo / name).write_bytes(b"x" * 100)
    (repo / "README.md").write_text("---\nlicense: mit\n---\n")
    with hub("someone/some-model", repo) as server:
        first = resolve_in_child(server.url, tmp_path / "cache", "someone/some-model")
        assert first["name"] == "some-model"
        assert (first["model"], first["revision"]) == ("someone/some-model", COMMIT)
        assert first["files"] == sorted([*(path.name for path in tiny_gpt2.iterdir()), "README.md"])
        assert first["notes"] == []
        downloads = [
            request for request in server.requests if request.startswith("GET") and "/resolve/" in request
        ]
        assert len(downloads) == len(first["files"])
        resolve_in_child(server.url, tmp_path / "cache", "someone/some-model", COMMIT)
        assert [
            request for request in server.requests if "/resolve/" in request and "GET" in request
        ] == downloads
    # Without the server the cache is enough.
    again = resolve_in_child(server.url, tmp_path / "cache", "someone/some-model")
    assert again["folder"] == first["folder"]
    weights = from_folder(Path(again["folder"])).weights
    assert weights.keys() == from_folder(tiny_gpt2).weights.keys()


def test_what_the_hub_does_not_have_is_said(tiny_gpt2: Path, tmp_path: Path) -> None:
    with hub("someone/some-model", tiny_gpt2) as server:
        missing = resolve_in_child(server.url, tmp_path / "cache", "no/such-model")
        assert "no/such-model is not a folder here, and not a Hub repo" in missing["error"]
        assert missing["exit_code"] == 1
        revision = resolve_in_child(server.url, tmp_path / "cache", "someone/some-model", "v9")
        assert "has no revision 'v9'" in revision["error"]


def test_a_download_that_breaks_off_is_one_line(tiny_gpt2: Path, tmp_path: Path) -> None:
    with hub("someone/some-model", tiny_gpt2) as server:
        server.cuts = math.inf
        broken = resolve_in_child(server.url, tmp_path / "cache", "someone/some-model")
        assert "someone/some-model could not be downloaded" in broken["error"]
        server.cuts = 0
        kept = {name for name in server.sent if name != "model.safetensors"}
        assert kept, "nothing else was downloaded"
        server.sent.clear()
        whole = resolve_in_child(server.url, tmp_path / "cache", "someone/some-model")
        assert not kept & server.sent.keys(), "what was whole was downloaded again"
    assert from_folder(Path(whole["folder"])).sha256 == from_folder(tiny_gpt2).sha256


def test_a_connection_that_breaks_is_taken_up_where_it_broke(tiny_gpt2: Path, tmp_path: Path) -> None:
    with hub("someone/some-model", tiny_gpt2) as server:
        server.cuts = 1
        found = resolve_in_child(server.url, tmp_path / "cache", "someone/some-model")
        size = (tiny_gpt2 / "model.safetensors").stat().st_size
        assert server.sent["model.safetensors"] == size - (size // 2 >> 20 << 20)
    assert from_folder(Path(found["folder"])).sha256 == from_folder(tiny_gpt2).sha256


def test_a_name_with_no_hub_in_reach_is_never_replaced(tmp_path: Path) -> None:
    facts = resolve_in_child(NO_HUB, tmp_path, "no/such-model")
    assert (
        "no/such-model is not a folder here and not in the Hub's cache, and the Hub could not be reached"
        in facts["error"]
    )
    assert facts["notes"] == []


def test_with_no_name_and_no_hub_the_bundled_model_is_used_and_said(tmp_path: Path) -> None:
    facts = resolve_in_child(NO_HUB, tmp_path, None)
    if "error" in facts:
        assert "bundled model is missing" in facts["error"]
        pytest.skip(f"models/{BUNDLED_NAME} is not made yet")
    assert (facts["name"], facts["model"], facts["revision"]) == (BUNDLED_NAME, BUNDLED_NAME, "")
    assert any("BUNDLED MODEL" in note for note in facts["notes"])
    assert any(DEFAULT_REPO_ID in note and "could not be reached" in note for note in facts["notes"])


def test_with_no_name_and_a_hub_gpt2_is_used(tiny_gpt2: Path, tmp_path: Path) -> None:
    with hub(DEFAULT_REPO_ID, tiny_gpt2) as server:
        facts = resolve_in_child(server.url, tmp_path, None)
    assert (facts["name"], facts["model"], facts["revision"]) == ("gpt2", DEFAULT_REPO_ID, COMMIT)
    assert facts["notes"] == [f"No model named: using {DEFAULT_REPO_ID}."]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 99\n", "it is a Git LFS pointer"),
        (b"<!doctype html><title>502</title>", "it is an HTML page"),
    ],
)
def test_what_a_mirror_serves_in_place_of_weights_is_named(
    content: bytes, what: str, tiny_gpt2: Path, tmp_path: Path
) -> None:
    repo = shutil.copytree(tiny_gpt2, tmp_path / "repo")
    (repo / "model.safetensors").write_bytes(content)
    with hub("someone/some-model", repo) as server:
        found = resolve_in_child(server.url, tmp_path / "cache", "someone/some-model")
    with pytest.raises(SourceError, match=f"model.safetensors is not a safetensors file: {what}"):
        assert from_folder(Path(found["folder"])).weights


def test_pickles_are_downloaded_only_when_allowed_and_needed(tiny_gpt2: Path, tmp_path: Path) -> None:
    repo = shutil.copytree(tiny_gpt2, tmp_path / "repo")
    (repo / "model.safetensors").rename(repo / "pytorch_model.bin")
    with hub("someone/some-model", repo) as server:
        without = resolve_in_child(server.url, tmp_path / "cache", "someone/some-model")
        assert "pytorch_model.bin" not in without["files"]
        allowed = resolve_in_child(server.url, tmp_path / "cache", "someone/some-model", allow_pickle=True)
        assert "pytorch_model.bin" in allowed["files"]
        (repo / "pytorch_model.bin").rename(repo / "model.safetensors")
        (repo / "pytorch_model.bin").write_bytes(b"PK")
        both = resolve_in_child(server.url, tmp_path / "other", "someone/some-model", allow_pickle=True)
        assert "pytorch_model.bin" not in both["files"]


def test_a_single_safetensors_file_is_its_folders_checkpoint(tiny_gpt2: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_gpt2, tmp_path / "one")
    file = folder / "model.safetensors"
    source = resolve(str(file), None, notes().append)
    assert (source.folder, source.name) == (folder, "one")
    other = shutil.copy(file, folder / "other.safetensors")
    with pytest.raises(UsageError, match="is one of several weight files in its folder"):
        resolve(str(other), None, notes().append)
    with pytest.raises(SourceError, match=r"holds no config\.json"):
        resolve(shutil.move(other, tmp_path / "lone.safetensors"), None, notes().append)


def test_one_folder_holds_one_set_of_weights_for_every_format(tiny_gpt2: Path, tmp_path: Path) -> None:
    """A stale index and old shards beside a newer file: all take the file, as transformers does, and it is said."""
    from safetensors.numpy import load_file, save_file

    from ggtool.conversion.convert import convert
    from ggtool.formats import find_qtype
    from ggtool.quantizers.pretrained import load_float, match_tensors, skeleton

    folder = shutil.copytree(tiny_gpt2, tmp_path / "two")
    old = {name: 3 * array for name, array in load_file(folder / "model.safetensors").items()}
    save_file(old, folder / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(old, "model-00001-of-00001.safetensors")}))
    said: list[str] = []
    source = resolve(str(folder), None, said.append)
    (note,) = said
    assert "model.safetensors is used, as transformers does" in note
    new = load_file(tiny_gpt2 / "model.safetensors")["wte.weight"]
    import torch

    assert np.array_equal(
        load_float(folder, torch.float32, "cpu").transformer.wte.weight.detach().numpy(), new
    )
    assert np.array_equal(match_tensors(folder, skeleton(folder))["transformer.wte.weight"].float32(), new)
    made, plain = (
        convert(one, [find_qtype("f32")], lambda _, name=name: tmp_path / f"{name}.gguf")[0].path.read_bytes()
        for name, one in (("two", source), ("plain", replace(from_folder(tiny_gpt2), name="two")))
    )
    assert made == plain
    before = source.sha256
    (folder / "model-00001-of-00001.safetensors").unlink()
    assert from_folder(folder).sha256 == before


def test_an_adapter_is_named_with_its_base(tiny_gpt2: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": "someone/base"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    (adapter / "adapter_model.safetensors").write_bytes((tiny_gpt2 / "model.safetensors").read_bytes())
    with pytest.raises(SourceError, match="holds a LORA adapter of someone/base and no model of its own"):
        resolve(str(adapter), None, notes().append)
    shutil.copy(tiny_gpt2 / "config.json", adapter)
    with pytest.raises(SourceError, match="adapter of someone/base"):
        from_folder(adapter).weights  # noqa: B018
    shutil.copy(tiny_gpt2 / "model.safetensors", adapter)
    said: list[str] = []
    resolve(str(adapter), None, said.append)
    assert "without the adapter" in said[0]


def test_a_snapshot_in_the_hubs_cache_has_the_repos_name(tiny_gpt2: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hub" / "models--someone--some-model" / "snapshots" / ("0123456789" * 4)
    shutil.copytree(tiny_gpt2, folder)
    source = from_folder(folder)
    assert (source.name, source.model, source.revision) == ("some-model", "someone/some-model", folder.name)


def test_a_null_is_no_quantization(tiny_gpt2: Path, tmp_path: Path) -> None:
    import torch

    from ggtool.quantizers.pretrained import load_float

    for settings in (None, {"quant_method": "bitsandbytes", "load_in_4bit": True}):
        folder = shutil.copytree(tiny_gpt2, tmp_path / str(settings is None))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
        loaded = load_float(folder, torch.float32, "cpu").transformer.h[0].mlp.c_fc.weight
        assert torch.equal(
            loaded, load_float(tiny_gpt2, torch.float32, "cpu").transformer.h[0].mlp.c_fc.weight
        )


def test_prefixes_are_stripped_for_transformers_too(tiny_gpt2: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.numpy import load_file, save_file

    from ggtool.quantizers.pretrained import load_float

    folder = shutil.copytree(tiny_gpt2, tmp_path / "wrapped")
    weights = load_file(folder / "model.safetensors")
    wrapped = {f"module._orig_mod.transformer.{name}": array for name, array in weights.items()}
    save_file(wrapped, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(
        load_float(folder, torch.float32, "cpu").transformer.wpe.weight,
        load_float(tiny_gpt2, torch.float32, "cpu").transformer.wpe.weight,
    )
