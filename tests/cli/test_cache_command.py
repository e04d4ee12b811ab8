"""`ggtool cache`: what it lists, and that it removes what was chosen and nothing else."""

import fcntl
import json
import os
import subprocess
import sys
import time

import pytest

from ggtool.cli.cache import cache
from ggtool.errors import OutputError, UsageError
from ggtool.system.atomic import atomic_output
from ggtool.system.cache_entries import list_entries

A, B = "a" * 16, "b" * 16


@pytest.fixture
def folder(tmp_path, monkeypatch):
    root = tmp_path / "cache"
    files = {
        f"gguf/{A}-11111111/gpt2-demo-Q4_0.gguf": 3 << 20,
        f"gguf/{A}-11111111/gpt2-demo-F16.gguf": 1 << 20,
        f"gguf/{B}-11111111/tiny-llama-Q8_0.gguf": 2 << 20,
        f"calibration/{A}-22222222/imatrix-ab12.gguf": 1000,
        f"packed/{B}-33333333/tiny-llama-scratch-gptq4-cd34/model.safetensors": 500,
        "kernels/0123456789abcdef.so": 100,
        "wheels/py3-linux-x86_64-0123/llama_cpp_python.whl": 7 << 20,
        ".lock": 0,
    }
    for name, size in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes(size))
    old = time.time() - 40 * 86400
    os.utime(root / f"gguf/{B}-11111111/tiny-llama-Q8_0.gguf", (old, old))
    monkeypatch.setenv("GGTOOL_CACHE", str(root))
    return root


@pytest.fixture
def run(capsys, folder):
    def call(**choices):
        settings = {
            "older_than": None,
            "model": None,
            "kind": None,
            "all_": False,
            "delete": False,
            "json_": True,
        }
        cache(**settings | choices)
        return json.loads(capsys.readouterr().out)

    return call


def kinds(found):
    return sorted(entry["kind"] for entry in found["entries"])


def test_everything_is_listed_with_sizes_and_models(run, folder) -> None:
    found = run()
    assert kinds(found) == ["calibration", "gguf", "gguf", "kernels", "packed", "wheels"]
    assert found["size_bytes"] == (13 << 20) + 1600
    entries = {entry["kind"]: entry for entry in found["entries"]}
    # What was measured on a model is the model's, though its name is only in the folder of GGUF files.
    assert entries["calibration"]["models"] == ["gpt2-demo-F16.gguf", "gpt2-demo-Q4_0.gguf"]
    assert not found["deleted"]


def test_the_text_has_a_line_for_each_and_the_sum(folder, capsys) -> None:
    cache(older_than=None, model=None, kind=None, all_=False, delete=False, json_=False)
    said = capsys.readouterr().out
    assert f"4.0 MiB    {A}-11111111  today  gpt2-demo-F16.gguf, gpt2-demo-Q4_0.gguf" in said
    assert f"{A}-22222222  today  imatrix-ab12.gguf (of gpt2-demo-F16.gguf)" in said
    assert "40 days ago" in said
    assert said.splitlines()[-1] == f"13.0 MiB in {folder}"


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"older_than": "30d"}, ["gguf"]),
        ({"older_than": "9w"}, []),
        ({"model": "GPT2-demo"}, ["calibration", "gguf"]),
        ({"model": "tiny"}, ["gguf", "packed"]),
        ({"model": "tiny", "older_than": "4w"}, ["gguf"]),
        ({"kind": ["kernels", "packed"]}, ["kernels", "packed"]),
        ({"all_": True}, ["calibration", "gguf", "gguf", "kernels", "packed", "wheels"]),
    ],
)
def test_what_is_chosen_goes_and_the_rest_stays(run, folder, choice, expected) -> None:
    before = kinds(run())
    if "all_" not in choice:
        assert kinds(run(**choice)) == expected
        assert kinds(run()) == before  # choosing alone removes nothing
    found = run(delete=True, **choice)
    assert found["deleted"]
    assert kinds(found) == expected
    for kind in expected:
        before.remove(kind)
    assert kinds(run()) == before
    assert not list(folder.glob(".removed-*"))


def test_a_checkpoint_folder_chooses_what_was_made_of_it(run, folder, tiny_gpt2) -> None:
    from ggtool.source.resolve import resolve

    content = resolve(str(tiny_gpt2), None, print).sha256[:16]
    (folder / f"gguf/{A}-11111111").rename(folder / f"gguf/{content}-11111111")
    found = run(model=str(tiny_gpt2), delete=True)
    assert kinds(found) == ["gguf"]
    assert content in found["entries"][0]["path"]


def test_what_an_interrupted_removal_left_goes_with_the_next(run, folder) -> None:
    (folder / ".removed-abc").mkdir()
    (folder / ".removed-abc" / "file").touch()
    run(kind=["kernels"], delete=True)
    assert not (folder / ".removed-abc").exists()


def test_a_build_and_a_writer_are_not_disturbed(run, folder) -> None:
    with (folder / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="a build is using"):
            run(all_=True, delete=True)
        assert kinds(run(kind=["kernels"], delete=True)) == ["kernels"]
    writing = folder / f"gguf/{A}-11111111/gpt2-demo-Q6_K.gguf"
    with atomic_output(writing) as temporary:
        temporary.write_bytes(b"half")
        with pytest.raises(OutputError, match="is being written"):
            run(model="gpt2-demo", delete=True)
        temporary.write_bytes(b"whole")
    assert writing.read_bytes() == b"whole"


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        ({"delete": True}, "--delete needs a choice"),
        ({"all_": True}, "--all is for --delete"),
        ({"all_": True, "delete": True, "model": "x"}, "leave out"),
        ({"older_than": "soon"}, "'soon' is no age; write 30d"),
        ({"kind": ["ggufs"]}, "there is no kind 'ggufs' in the cache; there are gguf, packed"),
    ],
)
def test_a_wrong_choice_is_one_line(run, choice, says) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        run(**choice)
    assert "\n" not in str(caught.value)


def test_no_cache_is_an_empty_one(tmp_path) -> None:
    assert list_entries(tmp_path / "none") == []
    done = subprocess.run(
        [sys.executable, "-m", "ggtool", "cache"],
        env={**os.environ, "GGTOOL_CACHE": str(tmp_path / "none")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, f"0.0 KiB in {tmp_path / 'none'}\n")
